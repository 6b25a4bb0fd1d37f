"""Two functions of the stock Trainer are patched only while ours runs; logs contain no secrets."""

import errno
import logging

import pytest
import training.trainer as host
from training.utils.train_utils import MemMeter, log_env_variables

from sam2_lora_ext.host.patches import HostMemMeter, at_work, host_guards, log_redacted_environment, redact
from sam2_lora_ext.utils.errors import UserError


def test_replaced_inside_and_restored_after():
    with host_guards("cpu"):
        assert host.MemMeter is HostMemMeter and host.log_env_variables is log_redacted_environment
    assert host.MemMeter is MemMeter and host.log_env_variables is log_env_variables
    with host_guards("cuda"):
        assert host.MemMeter is MemMeter and host.log_env_variables is log_redacted_environment
    with pytest.raises(RuntimeError), host_guards("cpu"):
        raise RuntimeError
    assert host.MemMeter is MemMeter and host.log_env_variables is log_env_variables


def test_memory_of_the_process():
    meter = HostMemMeter("Mem (GB)", "cpu")
    meter.update(reset_peak_usage=True)
    assert 0.05 < meter.val == meter.avg == meter.peak < 100


@pytest.mark.parametrize(
    ("name", "value", "logged"),
    [
        ("HF_TOKEN", "x1", "<redacted>"),
        ("AWS_SECRET_ACCESS_KEY", "x2", "<redacted>"),
        ("db_password", "x3", "<redacted>"),
        ("MYSQL_PWD", "x4", "<redacted>"),
        ("PGPASSFILE", "x5", "<redacted>"),
        ("SSH_AUTH_SOCK", "x6", "<redacted>"),
        ("SENTRY_DSN", "x7", "<redacted>"),
        ("WANDB_API_KEY", "x8", "<redacted>"),
        ("GOOGLE_CREDENTIALS", "x9", "<redacted>"),
        ("HTTPS_PROXY", "http://me:x10@host:80/", "http://me:<redacted>@host:80/"),
        ("URL", "https://x11@host", "https://<redacted>@host"),
        ("PATH", "/usr/bin:/bin", "/usr/bin:/bin"),
        ("HOME", "/root", "/root"),
        ("RANK", "0", "0"),
    ],
)
def test_redaction(name, value, logged, monkeypatch, caplog):
    assert redact(name, value) == logged
    monkeypatch.setenv(name, value)
    with caplog.at_level(logging.INFO):
        log_redacted_environment()
    assert f"{name}={logged}" in caplog.text


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("a sentence"), 2),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_ends_without_a_traceback(error, code, capsys):
    with pytest.raises(SystemExit) as stopped, at_work("cpu"):
        raise error
    assert stopped.value.code == code
    said = capsys.readouterr().err
    if code == 2:
        assert said.startswith("error: ") and said.count("\n") == 1
    if isinstance(error, OSError):
        assert "cannot write /x/y: No space left on device" in said


def test_a_wrapped_mistake_is_found_and_a_bug_is_not_hidden():
    with pytest.raises(SystemExit), at_work("cpu"):
        try:
            raise UserError("inner")
        except UserError as error:
            raise RuntimeError("Error in call to target") from error
    for bug in (ValueError("a bug"), OSError(errno.EBADF, "Bad file descriptor")):
        with pytest.raises(type(bug)), at_work("cpu"):
            raise bug
