"""The trainer: one step, its optimizer, when it has diverged, what it saves, which weights it hands on, and its process."""
