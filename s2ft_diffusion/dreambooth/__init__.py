"""What the DreamBooth recipe is made of: arguments, images, draws, prompts, class images, checkpoints, phases."""
