"""Tasks of lm-evaluation-harness: which are asked, how their requests are answered, and what becomes of the answers."""
