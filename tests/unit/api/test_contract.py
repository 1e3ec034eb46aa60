"""The contract between operator and trainer: keys, names and exit codes."""

from hypothesis import given
from hypothesis import strategies as st

from qlora_api import names
from qlora_api.layout import RunLayout, adapter_key, checkpoint_key, merged_key, parse_checkpoint
from qlora_api.run import FREE, NEVER_RETRIED, AgentState, ExitCode, Report, RunIdentity

RUN = RunIdentity(namespace="ml", name="smol", uid="0123456789abcdef")


def test_every_key_stands_below_the_run() -> None:
    layout = RunLayout.of("s3://bucket/out/", RUN)
    assert layout.root == "s3://bucket/out/smol-01234567"
    assert layout.uri(adapter_key(7)) == "s3://bucket/out/smol-01234567/adapter/gen-00007"
    assert merged_key(7) != merged_key(8) and adapter_key(7) != adapter_key(8)


@given(st.integers(0, 99_999_999), st.integers(0, 99_999))
def test_a_checkpoint_key_says_step_and_generation(step: int, generation: int) -> None:
    key = RunLayout("s3://b/r").uri(checkpoint_key(step, generation))
    assert parse_checkpoint(key + "/manifest.json") == (step, generation)


def test_a_foreign_key_is_no_checkpoint() -> None:
    assert parse_checkpoint("s3://b/r/adapter/gen-00007/adapter_model.safetensors") is None


def test_the_longest_name_fits_a_label() -> None:
    assert len(names.pod_name("x" * names.MAX_NAME, 511, 99_999_999)) <= 63


def test_exit_codes_are_one_thing_each() -> None:
    assert not NEVER_RETRIED & FREE
    assert ExitCode.OUT_OF_MEMORY not in NEVER_RETRIED | FREE


def test_a_report_goes_over_the_wire_and_back() -> None:
    report = Report(address="10.0.0.1", state=AgentState.READY, generation=3, wait_seconds=1)
    assert Report.model_validate(report.to_wire()) == report
