"""How a video is sampled where nobody says otherwise. Stands alone, so that asking costs no import of torch."""

STEPS = 20  # Euler steps a group of latents
# Measured on the shipped weights over 81 frames: less guidance loses some faint textures, more follows the prompt no
# better; without rescaling clouds gain contrast from group to group, with more of it stripes lose some.
GUIDANCE_SCALE = 2.0
GUIDANCE_RESCALE = 0.5  # share of the contrast that guidance adds and that is taken back, see `flow.rescale_guidance`
