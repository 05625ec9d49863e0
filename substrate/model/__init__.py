"""The model that every candidate shares: a Nemotron-3-shaped hybrid built from Megatron-Core's own parts."""
