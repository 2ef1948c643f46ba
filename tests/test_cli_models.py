"""`drl taps` and `drl plan` for real sizes, offline."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from drl_data.cli import app
from drl_data.errors import UserError, WeightsError
from drl_data.pipeline import Pipeline
from drl_data.runs import extract
from drl_data.testing import write_photo_tars


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def line_of(output: str, tap: str) -> list[str]:
    (line,) = [line for line in output.splitlines() if line.split()[:1] == [tap]]
    return line.split()


def test_taps_of_a_hub_id_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    output = run("taps", "stable-diffusion-v1-5/stable-diffusion-v1-5", "--depth", "2")
    assert line_of(output, "up_blocks.1")[-5:] == ["c", "h", "w", "1280x32x32", "55%"]
    assert "at 512 px: 859.5 M parameters, 803 GFLOP a forward" in output
    assert "up_blocks.1.resnets.0" not in output
    assert "up_blocks.1.resnets.0.conv2" in run("taps", "bundled:ddpm-cifar10-32", "--depth", "0")


def test_taps_of_adm_have_both_names() -> None:
    output = run("taps", "bundled:adm-256-uncond", "--depth", "4")
    assert line_of(output, "up_blocks.1.attentions.1")[1] == "output_blocks.4"
    assert line_of(output, "mid_block.resnets.1")[1] == "middle_block"
    assert "552.8 M parameters" in output


PIPELINE = """
name: dift
dataset: {{tars: "{tars}/*.tar"}}
images: {{size: 512}}
backbone: {{model: {model}, revision: main}}
schedule: {{timesteps: [0, 261]}}
noise: {{members: 4}}
taps: [up_blocks.1]
store: {{url: store.zarr}}
"""


def test_plan_does_without_files_that_are_yet_to_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    write_photo_tars(tmp_path / "tars", n_samples=4)
    file = tmp_path / "dift.yaml"
    hub = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    text = PIPELINE.format(tars=tmp_path / "tars", model=hub)
    text = text.replace("backbone: {", "backbone: {weights: unet.safetensors, ")
    file.write_text(text + "\ncondition: {prompt_embeddings: learnt.safetensors}\n")
    output = " ".join(run("plan", str(file)).split())
    assert "1280x32x32" in output
    for name in ("unet.safetensors", "learnt.safetensors"):
        assert f"planned without {tmp_path / name}, which is not there" in output
    with pytest.raises(UserError):
        extract(Pipeline.load(file))


def test_plan_prints_flops_and_extract_asks_for_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    write_photo_tars(tmp_path / "tars", n_samples=4)
    file = tmp_path / "dift.yaml"
    hub = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    file.write_text(PIPELINE.format(tars=tmp_path / "tars", model=hub))
    output = " ".join(run("plan", str(file)).split())
    assert "1280x32x32" in output
    assert (
        "4.63 TFLOP per image: 1.12 TFLOP to encode + 8 forwards of 439 GFLOP, cut after the last "
        "tap (whole: 803 GFLOP; saved: 45%)"
    ) in output
    assert "bundled:stable-diffusion-v1-5" in output
    with pytest.raises(WeightsError, match="neither in the local cache"):
        extract(Pipeline.load(file))
    file.write_text(PIPELINE.format(tars=tmp_path / "tars", model="bundled:stable-diffusion-v1-5"))
    with pytest.raises(WeightsError, match="configuration without weights"):
        extract(Pipeline.load(file))
    assert not (tmp_path / "store.zarr").exists()
