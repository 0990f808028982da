"""The systems that EMP-SSL is compared with, on its data, patches, encoder, loop and probe.

    python -m study.baselines --method simclr --dataset cifar10 --epochs 10

A file a paper. A method is an objective that `empssl.train` calls with the embeddings z (v, b, d)
of v views of b images, not normalised, their patches x (v*b, 3, s, s), and the images' numbers in
the data set, index (b,). S3L is a setting of each: see s3l.py.
"""
