"""Class prompts: learned tokens that replace clicks, so that an image is segmented without any."""
