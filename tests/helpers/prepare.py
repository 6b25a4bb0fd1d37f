"""`tools/prepare_data.py` in process."""

import prepare_data


def run(*arguments):
    prepare_data.main([str(argument) for argument in arguments])
