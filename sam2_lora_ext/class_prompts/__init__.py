"""Class prompts: learned tokens that take the place of clicks, so that an image is segmented without one."""
