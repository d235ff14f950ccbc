"""Generated code is what protos/ says: a stale or edited file fails here. Mend with `make protos`."""

from __future__ import annotations

import base64
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from google.api import field_behavior_pb2, field_info_pb2, resource_pb2
from google.protobuf import descriptor_pb2

ROOT = Path(__file__).parents[2]
# Importing them makes their options known, so that both sides parse them.
OPTIONS = (field_behavior_pb2, field_info_pb2, resource_pb2)


def image() -> dict[str, descriptor_pb2.FileDescriptorProto]:
    """The compiled protos of the working tree, by file name."""
    buf = Path(sys.executable).with_name("buf")
    command = [
        str(buf if buf.exists() else shutil.which("buf")),
        "build",
        "protos",
        "--exclude-source-info",
        "-o",
        "-",
    ]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    files = descriptor_pb2.FileDescriptorSet.FromString(built.stdout)
    return {file.name: file for file in files.file if file.name.startswith("luthier/")}


IMAGE = image()


TYPESCRIPT = ROOT / "clients" / "typescript" / "src" / "gen"
PUBLIC = sorted(name for name in IMAGE if name.startswith("luthier/v1/"))


@pytest.mark.parametrize("name", PUBLIC)
def test_committed_typescript_matches_its_proto(name: str) -> None:
    """Needs no Node; tests/typescript.sh compares all of the text with what the generator writes."""
    text = (TYPESCRIPT / name.replace(".proto", "_pb.ts")).read_text()
    found = re.search(r'fileDesc\("([A-Za-z0-9+/]+)"', text)
    assert found is not None
    encoded = found[1] + "=" * (-len(found[1]) % 4)
    committed = descriptor_pb2.FileDescriptorProto.FromString(base64.b64decode(encoded))
    wanted = descriptor_pb2.FileDescriptorProto()
    wanted.CopyFrom(IMAGE[name])
    for file in (committed, wanted):
        strip_json_names(file)
        file.DiscardUnknownFields()
        file.ClearField("dependency")  # they are imports of the module
    assert committed == wanted


def test_no_generated_typescript_is_left_over() -> None:
    found = {
        str(path.relative_to(TYPESCRIPT)).replace("_pb.ts", ".proto")
        for path in (TYPESCRIPT / "luthier").rglob("*_pb.ts")
    }
    assert found == set(PUBLIC)


@pytest.mark.parametrize("name", sorted(IMAGE))
def test_committed_code_matches_its_proto(name: str) -> None:
    module = importlib.import_module(name.removesuffix(".proto").replace("/", ".") + "_pb2")
    committed = descriptor_pb2.FileDescriptorProto.FromString(module.DESCRIPTOR.serialized_pb)
    wanted = IMAGE[name]
    for file in (committed, wanted):
        strip_json_names(file)
        file.DiscardUnknownFields()  # buf adds extensions of its own
    assert committed == wanted


def test_no_generated_file_is_left_over() -> None:
    roots = (ROOT / "clients/python", ROOT / "services")
    found = {
        str(path.relative_to(root)).removesuffix("_pb2.py") + ".proto"
        for root in roots
        for path in root.rglob("*_pb2.py")
    }
    assert found == set(IMAGE)


def strip_json_names(file: descriptor_pb2.FileDescriptorProto) -> None:
    """Compilers differ in whether they write down the default JSON names."""

    def strip(message: descriptor_pb2.DescriptorProto) -> None:
        for field in message.field:
            field.ClearField("json_name")
        for nested in message.nested_type:
            strip(nested)

    for message in file.message_type:
        strip(message)
