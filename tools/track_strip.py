#!/usr/bin/env python
"""`sam2-lora track` from a checkout, which need not be installed; see `--help`."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from sam2_lora_ext.utils.command_line import catch_interrupts, run_cli

if __name__ == "__main__":
    catch_interrupts()  # before the slow imports

from sam2_lora_ext.commands.track import main

if __name__ == "__main__":
    run_cli(main)
