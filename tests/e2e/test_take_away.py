"""What is taken away over real processes: merged, exported, downloaded, and loaded where there is no Luthier."""

from __future__ import annotations

import json
import os
import re
import site
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from tests.e2e import drawing
from tests.e2e.conftest import WAIT, Cluster, Shared, job
from tests.e2e.test_weights import TURNS, perplexity

from luthier.client import Client
from luthier.client.cli import main
from luthier.errors import FailedPrecondition, InvalidArgument
from luthier.v1.model_pb2 import Model

pytestmark = pytest.mark.e2e
README = Path(__file__).parents[2] / "README.md"
END = 2
OTHERS = ("luthier", "_luthier", "_editable", "__editable")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages of this environment but ours: what whoever loads a download has."""
    folder = tmp_path_factory.mktemp("environment")
    for packages in map(Path, site.getsitepackages()):
        for entry in packages.iterdir():
            if not entry.name.startswith(OTHERS):
                (folder / entry.name).symlink_to(entry)
    return folder


def run(environment: Path, folder: Path, code: str) -> str:
    """Run a program in a folder, in an interpreter that knows nothing of us; returns what it prints."""
    check = "import importlib.util\nassert importlib.util.find_spec('luthier') is None\n"
    clean = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"{check}{code}"],
        cwd=folder,
        env={**clean, "PYTHONPATH": str(environment), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def luthier(cluster: Cluster, *arguments: str) -> str:
    """Run a command against the cluster, which must succeed; returns what it writes."""
    addresses = {f"LUTHIER_{name.upper()}_ADDRESS": address for name, address in cluster.addresses.items()}
    environment = {"LUTHIER_HOME": str(cluster.home), **addresses}
    result = CliRunner().invoke(main, arguments, env=environment, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_tuned_model_is_taken_away_in_every_form(whole: Shared, environment: Path, tmp_path: Path) -> None:
    cluster, rendering = whole.cluster, whole.rendering
    with cluster.client() as client:
        client.jobs.create(job(rendering, 30, tuned_model_id="support-1"), job_id="take")
        with pytest.raises(FailedPrecondition, match=r"support-1 must be READY, .*/take still trains it"):
            client.models.merge("support-1")
        client.jobs.wait("take", timeout_seconds=WAIT)
        version = client.renderings.get(rendering).dataset_version
        (tuned,) = perplexity(client, version, "support-1")

        luthier(cluster, "models", "merge", "support-1", "support-1-merged")
        merged = client.models.get("support-1-merged")
        assert (merged.kind, merged.state) == (Model.KIND_WEIGHTS, Model.STATE_READY)
        assert merged.tokenizer_digest == client.models.get("tiny").tokenizer_digest
        assert perplexity(client, version, "support-1-merged")[0] == pytest.approx(tuned, rel=0.02)
        assert list(client.generate("support-1-merged", TURNS, max_new_tokens=4))[-1].num_generated_tokens

        for name in ("tiny", "support-1"):
            luthier(cluster, "models", "download", name, str(tmp_path / name))
        (tmp_path / "tiny").rename(tmp_path / "base")
        forms = ("safetensors", "gguf-f16", "gguf-q8_0", "peft")
        for form in forms:
            shown = luthier(
                cluster,
                "models",
                "export",
                "support-1",
                str(tmp_path / f"support-1-{form}"),
                "--format",
                form,
            )
            assert "logits differ by" in shown or form == "peft"
        (tmp_path / "support-1-safetensors").rename(tmp_path / "support-1-merged")
        (tmp_path / "support-1-gguf-q8_0").rename(tmp_path / "support-1-gguf")
        check_cards(client, tmp_path)
        check_refusals(client)
    check_loading(environment, tmp_path)


def check_cards(client: Client, folder: Path) -> None:
    """Each download says what it was made from, what it learnt from, and how it was found to be."""
    uid = client.models.get("tiny").uid
    for name in ("support-1", "support-1-merged", "support-1-gguf", "support-1-peft"):
        card = (folder / name / "README.md").read_text()
        assert f"| model `tiny` | {uid} |" in card
        assert "| method | supervised |" in card
        assert re.search(r"\| train \| \d+ \| [\d,]+ \| [\d,]+ \|", card), card
        assert "perplexity" in card
        assert ("Compared with what it was made from" in card) == (
            name in ("support-1-merged", "support-1-gguf")
        )
        assert "could not be asked" not in card
    assert not (folder / "base" / "README.md").exists()


def check_refusals(client: Client) -> None:
    made = next(one for one in client.models.list() if one.kind == Model.KIND_EXPORT)
    with pytest.raises(InvalidArgument, match=r"must be a model of words, got .*a file for other programs"):
        list(client.generate(made.name, TURNS, max_new_tokens=4))
    with pytest.raises(
        InvalidArgument, match=r"must be an adapter of a model of words, got .*of kind WEIGHTS"
    ):
        client.models.merge("support-1-merged")


def check_loading(environment: Path, folder: Path) -> None:
    """The ways of the README, word for word, in an environment without Luthier."""
    blocks = [
        one
        for one in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
        if "./support-1" in one
    ]
    assert len(blocks) == 2
    ask = """
import json, torch
from transformers import AutoTokenizer
text = AutoTokenizer.from_pretrained("./base")("colour of thing 1?", return_tensors="pt")["input_ids"]
with torch.no_grad():
    print(json.dumps([{model}(text).logits[0, -1].float().tolist()]))
"""
    found = [
        json.loads(run(environment, folder, block + ask.format(model=f"{model}.float()")).splitlines()[-1])[0]
        for block, model in zip(blocks, ("tuned", "model"), strict=True)
    ]
    (folder / "drawing.py").write_text(Path(drawing.__file__).read_text())
    ends = "\nimport drawing\nprint(drawing.drawn({model}, {end}), drawing.drawn({model}, drawing.ANY))"
    for block, model in zip(blocks, ("tuned", "model"), strict=True):
        printed = run(environment, folder, block + ends.format(model=model, end=END)).splitlines()[-1]
        assert printed == f"3 {drawing.MOST}", "where its answers end here"
    spread = max(found[0]) - min(found[0])
    assert max(abs(one - other) for one, other in zip(*found, strict=True)) < 0.05 * spread
    (page,) = re.findall(
        r"```python\n(.*?)```", (README.parent / "docs" / "models.md").read_text(), re.DOTALL
    )
    run(environment, folder, page)
    gguf = f"""
import gguf
reader = gguf.GGUFReader("support-1-gguf/model-q8_0.gguf")
assert reader.fields["tokenizer.ggml.eos_token_id"].contents() == {END}
assert reader.fields["general.architecture"].contents() == "llama"
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("support-1-gguf-f16", gguf_file="model-f16.gguf")
"""
    read = json.loads(run(environment, folder, gguf + ask.format(model="model")).splitlines()[-1])[0]
    assert max(abs(one - other) for one, other in zip(found[1], read, strict=True)) < 0.05 * spread
