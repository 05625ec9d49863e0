"""Engines: what turns prompts into completions for the judge. One seam, three of them."""
