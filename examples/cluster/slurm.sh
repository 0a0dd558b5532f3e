#!/bin/sh
# Build a latent cache by an array job: 16 tasks with a GPU each, and 4 partitions for each task.
#   sbatch examples/cluster/slurm.sh /shared/videos /shared/cache
# A task that was killed runs again from its last shard: sbatch --array=7 examples/cluster/slurm.sh ...
#SBATCH --job-name=latent-cache
#SBATCH --array=1-16
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --requeue
odvae cache build "$1" "$2" --partitions 64 --part "$SLURM_ARRAY_TASK_ID/16" --workers 8 --frames 33 --size 256 256
