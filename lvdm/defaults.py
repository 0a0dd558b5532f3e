"""How a video is sampled where nobody says otherwise. Stands alone, so that asking costs no import of torch."""

STEPS = 20  # Euler steps a group of latents
GUIDANCE_SCALE = 1.5  # higher follows the prompt no better here, and contrast then grows from group to group
