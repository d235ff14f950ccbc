"""Generated code is what protos/ says: a stale or edited file fails here. Mend with `make protos`."""

from __future__ import annotations

import importlib
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
