"""Defaults of sampling. Importing them loads nothing."""

from typing import Literal

STEPS = 20  # of the scheduler, per group of latents
FLOW_MAP_STEPS = 4  # of a flow map
# Measured on the shipped weights over 81 frames: less guidance loses some faint textures, more does not follow the
# prompt any better; without rescaling, clouds gain contrast from group to group; with more of it, stripes lose some.
GUIDANCE_SCALE = 2.0
GUIDANCE_RESCALE = 0.5  # share of the contrast added by guidance that is removed again, see `flow.rescale_guidance`
HISTORY_GROUPS = 2  # past groups that a group attends to, besides the first latent
HISTORY_NOISE = 0.1  # noise level of that history
Scheduler = Literal["euler", "heun", "unipc", "dpm", "euler-ancestral", "ddim", "ddpm"]  # see `schedulers`
FLOW_SCHEDULERS = ("euler", "heun", "unipc", "dpm")  # of LVDMPipeline
EPSILON_SCHEDULERS = ("euler-ancestral", "euler", "ddim", "ddpm", "unipc", "dpm")  # of OpenSoraPipeline
