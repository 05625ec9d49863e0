"""The trainer: its step, optimizer, schedule and stopping rule, what it saves and hands on, and its process."""
