"""What the report's page shows: small images, which of them are alike, a map, curves."""

import base64
import colorsys
import html
import io
from typing import NamedTuple

import numpy as np
from PIL import Image

# Small images are kept as WebP of at most this many bytes together; the first pair of side in
# pixels and quality that gets there is used. A page has them in base64, a third longer.
BUDGET = 5_000_000
SIZES = ((64, 90), (64, 75), (64, 50), (48, 50), (32, 40))


class Shown(NamedTuple):
    """The images that a report shows; None or empty is what a run has not kept."""

    features: np.ndarray  # (N, width) float32, unit rows
    untrained: np.ndarray | None  # (N, width) the same of the encoder before training
    thumbnails: list[str]  # N data URIs
    labels: np.ndarray | None  # (N,)
    classes: list[str]
    names: list[str]  # N

    def about(self, i: int) -> str:
        """What stands below image i, and is read out where it cannot be seen."""
        return self.names[i] if self.labels is None else self.classes[self.labels[i]]


# ---- small images ----


def thumbnails(images: np.ndarray) -> list[bytes]:
    """`(N, 3, H, W)` uint8 -> N small WebP files, of no more than `BUDGET` bytes together."""
    for side, quality in SIZES:
        files = [webp(pixels, side, quality) for pixels in images]
        if sum(len(file) for file in files) <= BUDGET:
            break
    return files


def webp(pixels: np.ndarray, side: int, quality: int) -> bytes:
    """`(3, H, W)` uint8, no larger than `side` x `side` afterwards."""
    picture = Image.fromarray(pixels.transpose(1, 2, 0))
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "webp", quality=quality)
    return file.getvalue()


def data_uri(file: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(file).decode()}"


def image(uri: str, about: str, kind: str = "") -> str:
    about = html.escape(about)
    return f'<img src="{uri}" alt="{about}" title="{about}" class="{kind}">'


def figure(shown: Shown, i: int, more: str = "") -> str:
    caption = html.escape(shown.about(i)) + more
    return f"<figure>{tile(shown, i)}<figcaption>{caption}</figcaption></figure>"


def tile(shown: Shown, i: int, kind: str = "") -> str:
    return image(shown.thumbnails[i], shown.about(i), kind)


# ---- which images are alike ----


def nearest(features: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest other rows of each of N unit rows by cosine: who, `(N, k)`, and how near.

    All N - 1 others where there are no k.
    """
    k = min(k, len(features) - 1)
    cosine = features @ features.T  # (N, N)
    np.fill_diagonal(cosine, -np.inf)
    order = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(cosine, order, axis=1)


def twins(features: np.ndarray, share: float = 0.2) -> list[tuple[int, int, float]]:
    """Pairs of rows that are almost the same, most alike first, with their cosines.

    Almost the same: nearer to each other than `share` of what is usual, the median over all rows
    of the distance 1 - cosine to the nearest; or equal but for rounding.
    """
    cosine = features @ features.T
    first, second = np.triu_indices(len(features), 1)
    distance = 1 - cosine[first, second]
    np.fill_diagonal(cosine, -np.inf)
    usual = float(np.median(1 - cosine.max(axis=1)))
    near = np.flatnonzero(distance <= max(share * usual, 1e-4))
    near = near[np.argsort(distance[near], kind="stable")]
    return [(int(first[p]), int(second[p]), float(1 - distance[p])) for p in near]


def neighbour_rows(shown: Shown, some: np.ndarray, k: int = 8) -> str:
    """Each of `some` images with its k nearest, after training and before."""
    rows = [("after training", nearest(shown.features, k)[0])]
    if shown.untrained is not None:
        rows.append(("before", nearest(shown.untrained, k)[0]))
    parts = []
    for i in some:
        parts.append(f'<div class="query">{figure(shown, i)}')
        for title, order in rows:
            tiles = [tile(shown, j, frame(shown, i, j)) for j in order[i]]
            parts.append(f'<div class="row"><span>{title}</span>{"".join(tiles)}</div>')
        parts.append("</div>")
    return "".join(parts)


def frame(shown: Shown, i: int, j: int) -> str:
    if shown.labels is None:
        return ""
    return "same" if shown.labels[i] == shown.labels[j] else "other"


def share_of_same_class(features: np.ndarray, labels: np.ndarray, k: int = 8) -> float:
    """Of all images' k nearest, the share that is of the image's own class."""
    order, _ = nearest(features, k)
    return float((labels[order] == labels[:, None]).mean())


# ---- the map ----


def places(features: np.ndarray) -> np.ndarray:
    """t-SNE of N >= 2 unit rows: `(N, 2)`."""
    from sklearn.manifold import TSNE

    perplexity = min(30, (len(features) - 1) / 3)
    # The principal components of rows that are all alike, or of very few, are no start.
    spread = features.std(axis=0).max() > 1e-6 and min(features.shape) > 2
    start = "pca" if spread else "random"
    return TSNE(random_state=0, perplexity=perplexity, init=start).fit_transform(features)


def groups(features: np.ndarray, most: int = 8) -> np.ndarray:
    """The cluster of each of N rows, `(N,)`, by k-means with at most `most` clusters."""
    from sklearn.cluster import KMeans

    k = min(most, len(np.unique(features, axis=0)))
    return KMeans(k, n_init=4, random_state=0).fit_predict(features)


def colours(count: int) -> list[str]:
    """So many colours that can be told apart on white and on black, as far as there are."""
    wheel = []
    for i in range(count):
        lightness = (0.5, 0.62, 0.42)[i % 3]
        rgb = colorsys.hls_to_rgb(i / count, lightness, 0.7)
        wheel.append("#" + "".join(f"{round(255 * part):02x}" for part in rgb))
    return wheel


# A finger has no place to hover at: it shows the image that is nearest to where it touched.
TOUCH = """
const {x, y, picture, about} = source.data
const box = document.getElementById("touched")
box.hidden = !picture || window.lastPointer == "mouse"
if (box.hidden) return
const far = Array.from(x, (_, i) => (x[i] - cb_obj.x) ** 2 + (y[i] - cb_obj.y) ** 2)
const i = far.indexOf(Math.min(...far))
box.querySelector("img").src = picture[i]
box.querySelector("figcaption").textContent = about[i]
const room = box.parentElement.clientWidth - box.offsetWidth
box.style.left = Math.max(0, Math.min(room, cb_obj.sx - box.offsetWidth / 2)) + "px"
box.style.top = cb_obj.sy > 200 ? cb_obj.sy - box.offsetHeight - 20 + "px" : cb_obj.sy + 30 + "px"
"""
TOUCHED = """<figure id="touched" hidden><img alt=""><figcaption></figcaption></figure>
<script>addEventListener("pointerdown", e => window.lastPointer = e.pointerType, true)</script>"""


def draw_map(shown: Shown) -> tuple[str, str]:
    """A dot an image; its picture shows under the pointer. Returns the script and the element."""
    from bokeh.embed import components
    from bokeh.models import ColumnDataSource, CustomJS, HoverTool
    from bokeh.plotting import figure as bokeh_figure

    kinds = groups(shown.features) if shown.labels is None else shown.labels
    palette = colours(len(shown.classes) or int(kinds.max()) + 1)
    x, y = places(shown.features).T
    columns = {"x": x, "y": y, "colour": [palette[kind] for kind in kinds]}
    columns["about"] = [shown.about(i) for i in range(len(x))]
    picture = ""
    if shown.thumbnails:
        columns["picture"] = shown.thumbnails
        picture = '<img src="@picture" alt="" style="display: block; width: 96px; height: 96px">'
    plot = bokeh_figure(
        height=540,
        sizing_mode="stretch_width",
        toolbar_location=None,
        tools="",
        background_fill_alpha=0,
        border_fill_alpha=0,
        outline_line_color=None,
    )
    plot.axis.visible = False
    plot.grid.visible = False
    size = 9 if len(x) < 1000 else 6
    look = {"size": size, "fill_color": "colour", "line_color": None, "fill_alpha": 0.8}
    source = ColumnDataSource(columns)
    plot.scatter("x", "y", source=source, **look)
    about = '<div style="max-width: 96px; overflow-wrap: anywhere">@about</div>'
    plot.add_tools(HoverTool(tooltips=picture + about, limit=1))
    plot.js_on_event("tap", CustomJS(args={"source": source}, code=TOUCH))
    script, element = components(plot)
    return script, element + TOUCHED


def legend(shown: Shown) -> str:
    """Colour and name of each class, where they are few enough to be told apart."""
    if not 0 < len(shown.classes) <= 20:
        return ""
    pairs = zip(colours(len(shown.classes)), shown.classes, strict=True)
    marks = ""
    for colour, name in pairs:
        marks += f'<span><i style="background: {colour}"></i>{html.escape(name)}</span>'
    return f'<div class="legend">{marks}</div>'


# ---- curves ----


def draw_curve(plt, x: list[float], y: list[float], title: str, ends: dict) -> str:
    """One curve as SVG in the page's own colour of text; `ends` are other settings of the axes."""
    text = "#010203"
    plain = {name: text for name in ("text.color", "axes.edgecolor", "axes.labelcolor")}
    plain |= {"xtick.color": text, "ytick.color": text, "svg.fonttype": "none"}
    plain |= {"axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": title}
    with plt.rc_context(plain):
        drawing, ax = plt.subplots(figsize=(3, 2.2), layout="constrained")
        ax.plot(x, y, "-" if len(x) > 30 else "o-", color="#3f86d1", markersize=4)
        ax.set(xlabel="step", xlim=(0, 1.05 * max(x)), **ends)
        ax.set_title(title, fontsize=10, loc="left")
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        drawing.savefig(file, format="svg", transparent=True, metadata=nothing)
        plt.close(drawing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(text, "currentColor")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', 1)
