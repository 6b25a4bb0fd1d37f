"""Run by a test in a separate process: Ultralytics' masks of an image for prompts; input and output are files.

    python ultralytics_masks.py WEIGHTS IMAGE PROMPTS.json OUT.npz

PROMPTS.json is a list of keyword arguments of `SAM.predict`; OUT.npz holds `masks`, bool (prompts, H, W), and `name`,
the class of the model that was built.
"""

import json
import sys
from pathlib import Path

import numpy as np
from ultralytics import SAM

if __name__ == "__main__":
    weights, image, prompts, out = sys.argv[1:]
    sam = SAM(weights)
    found = []
    for prompt in json.loads(Path(prompts).read_text()):
        result = sam.predict(image, conf=0, save=False, verbose=False, device="cpu", **prompt)[0]
        found.append(result.masks.data[0].numpy())
    np.savez(out, masks=np.stack(found), name=type(sam.model).__name__)
