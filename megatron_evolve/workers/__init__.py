"""Workers: programs that are given a brief and answer with a proposal, and the seam that runs them as processes."""
