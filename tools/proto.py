"""Generate, check and lint the contracts in proto/.

python tools/proto.py generate   write stubs, type stubs and the bridge's descriptor set
python tools/proto.py check      fail if the committed files differ from what generate would write
python tools/proto.py lint       buf lint (STANDARD and COMMENTS)
python tools/proto.py breaking   buf breaking (WIRE_JSON) against proto/baseline.binpb
python tools/proto.py freeze     write proto/baseline.binpb: what later changes must keep (see docs/contract.md)
"""

from __future__ import annotations

import argparse
import filecmp
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import google.api.annotations_pb2
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
PACKAGE = Path("fastchat_grpc/v1")
BASELINE = PROTO / "baseline.binpb"
# googleapis-common-protos ships the .proto files beside the generated modules.
GOOGLE = Path(google.api.annotations_pb2.__file__).parents[2]
WELL_KNOWN = Path(protoc.__file__).parent / "_proto"
ERROR_DETAILS = "google/rpc/error_details.proto"
GENERATED = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "descriptors.binpb")


def generate(out: Path) -> None:
    """Write everything that derives from proto/ below `out`."""
    sources = sorted(str(path.relative_to(PROTO)) for path in PROTO.rglob("*.proto"))
    (out / PACKAGE).mkdir(parents=True, exist_ok=True)
    paths = ["protoc", f"-I{PROTO}", f"-I{GOOGLE}", f"-I{WELL_KNOWN}"]
    stubs = [f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}"]
    # The bridge prints the details of statuses too, so their types belong to its descriptors.
    described = ["--include_imports", f"--descriptor_set_out={out / PACKAGE / 'descriptors.binpb'}", ERROR_DETAILS]
    for arguments in ([*paths, *stubs, *sources], [*paths, *described, *sources]):
        if protoc.main(arguments) != 0:
            sys.exit("protoc failed")


def check() -> None:
    """Exit with an error if a committed file is stale."""
    with tempfile.TemporaryDirectory() as tmp:
        generate(Path(tmp))
        fresh = {path.name: path for pattern in GENERATED for path in (Path(tmp) / PACKAGE).glob(pattern)}
        committed = {path.name: path for pattern in GENERATED for path in (ROOT / PACKAGE).glob(pattern)}
        stale = sorted(
            name
            for name in fresh.keys() | committed.keys()
            if name not in fresh
            or name not in committed
            or not filecmp.cmp(fresh[name], committed[name], shallow=False)
        )
    if stale:
        sys.exit(f"stale generated files: {', '.join(stale)}; run make proto")


def workspace(tmp: Path, contracts: Path) -> Path:
    """Build a buf workspace of `contracts` and the google protos they import; buf's registry is not needed."""
    shutil.copytree(contracts, tmp / "proto", ignore=shutil.ignore_patterns(BASELINE.name))
    shutil.copy(PROTO / "buf.yaml", tmp / "buf.yaml")
    for name in ("annotations.proto", "http.proto", "httpbody.proto"):
        (tmp / "google/google/api").mkdir(parents=True, exist_ok=True)
        shutil.copy(GOOGLE / "google/api" / name, tmp / "google/google/api" / name)
    return tmp


def buf(*arguments: str) -> int:
    return subprocess.run([str(Path(sys.executable).with_name("buf")), *arguments], check=False).returncode


def lint() -> None:
    """Exit with buf's verdict on style and comments."""
    with tempfile.TemporaryDirectory() as tmp:
        sys.exit(buf("lint", str(workspace(Path(tmp), PROTO))))


def image(tmp: Path) -> Path:
    """The contracts as they are, in one file."""
    file = tmp / "image.binpb"
    if buf("build", str(workspace(tmp / "now", PROTO)), "--exclude-source-info", "-o", str(file)) != 0:
        sys.exit("buf build failed")
    return file


def freeze() -> None:
    """Make the contracts as they are the ones that later changes must keep."""
    with tempfile.TemporaryDirectory() as tmp:
        shutil.copy(image(Path(tmp)), BASELINE)


def breaking() -> None:
    """Exit with buf's verdict on compatibility with the frozen contracts."""
    with tempfile.TemporaryDirectory() as tmp:
        rules = '{"version": "v1", "breaking": {"use": ["WIRE_JSON"]}}'
        sys.exit(buf("breaking", str(image(Path(tmp))), "--against", str(BASELINE), "--config", rules))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("generate", "check", "lint", "breaking", "freeze"):
        commands.add_parser(name)
    args = parser.parse_args()
    match args.command:
        case "generate":
            generate(ROOT)
        case "check":
            check()
        case "lint":
            lint()
        case "breaking":
            breaking()
        case "freeze":
            freeze()


if __name__ == "__main__":
    main()
