"""Speed: verify, then time. One line a machine of study/results/ops.jsonl and step.jsonl."""
