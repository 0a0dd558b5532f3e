"""The transformer: rotary positions, blocks, and the model that is made of them."""
