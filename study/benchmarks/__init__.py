"""Speed: verify, then time. One line a machine of study/results/: ops, step, official.jsonl."""
