"""Types and ranges of all settings in one table (`table.py`), checked before anything is built."""

from sam2_lora_ext.settings.check import check, check_class_ids, check_literals, check_trainer

__all__ = ["check", "check_class_ids", "check_literals", "check_trainer"]
