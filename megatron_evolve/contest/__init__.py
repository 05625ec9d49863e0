"""The contest: this project's policy against other ways to spend the same training runs, on simulated surfaces."""
