import os
import random
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from inferloom.runtime import artifact as artifacts
from inferloom.runtime import manifest as manifests
from inferloom.runtime.artifact import Artifact, publish, seal, staging
from inferloom.runtime.errors import ArtifactError
from inferloom.runtime.llm import LLM
from tests.runtime.toy import toy_manifest, write_toy


@pytest.fixture
def toy(tmp_path) -> Path:
    write_toy(tmp_path / "toy", library=b"\x7fELF no code")
    return tmp_path / "toy"


def use_all(path: Path) -> None:
    """Open an artifact and use every file of it."""
    artifact = Artifact.open(path)
    artifact.load_weights()
    for name in artifact.manifest.files:
        artifact.read(name)


def reseal(path: Path, manifest: manifests.Manifest) -> None:
    """Seal a manifest as it is, as an attacker who can write the folder would."""
    data = manifests.dumps(manifest)
    (path / "manifest.json").write_bytes(data)
    (path / "SEAL").write_text(artifacts.blake3(data).hexdigest() + "\n")


def test_a_good_artifact_reads(toy):
    use_all(toy)
    artifact = Artifact.open(toy)
    assert artifact.read("tokenizer/tokenizer.json") == b"{}"
    weights = artifact.load_weights()
    assert weights.address % 64 == 0
    assert weights.tensors["scale"].shape == (16,)


@pytest.mark.parametrize("chunk", [1, 5, 32, 63])
def test_files_in_many_pieces(toy, monkeypatch, chunk):
    """Several threads read; every byte is verified, wherever its piece begins."""
    monkeypatch.setattr("inferloom.runtime.weights.CHUNK", chunk)
    use_all(toy)
    artifact, path = Artifact.open(toy), toy / "weights/model.safetensors"
    good = path.read_bytes()
    assert artifact.load_weights().memory.bytes.tobytes() == good
    for at in range(0, len(good), 13):
        path.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1:])
        with pytest.raises(ArtifactError, match="damaged"):
            artifact.load_weights()
        path.write_bytes(good[:at])
        with pytest.raises(ArtifactError, match=f"ends after {at} of {len(good)} bytes"):
            artifact.load_weights()
    path.unlink()
    with pytest.raises(ArtifactError, match="cannot open"):
        artifact.load_weights()


def test_a_tokenizer_that_cannot_be_read_is_an_error_and_leaves_nothing(tmp_path):
    write_toy(tmp_path / "toy")
    with pytest.raises(ArtifactError, match="tokenizer.json cannot be read"):
        LLM(tmp_path / "toy", threads=3)
    assert not [t for t in threading.enumerate() if t.name.startswith("inferloom")]


def test_sealing_is_deterministic(tmp_path):
    for name in "ab":
        write_toy(tmp_path / name, library=b"code")
    assert (tmp_path / "a/SEAL").read_bytes() == (tmp_path / "b/SEAL").read_bytes()


def test_200_random_bit_flips_are_refused(toy):
    random_bits = random.Random(7)
    files = sorted(p for p in toy.rglob("*") if p.is_file())
    for turn in range(200):
        path = files[turn % len(files)]
        good = path.read_bytes()
        bad = bytearray(good)
        bit = random_bits.randrange(len(bad) * 8)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        with pytest.raises(ArtifactError):
            use_all(toy)
        path.write_bytes(good)
    use_all(toy)


def test_every_file_is_needed_and_whole(toy):
    for path in sorted(p for p in toy.rglob("*") if p.is_file()):
        good = path.read_bytes()
        for bad in (None, b"", good[:-1], good + b"\n"):
            path.unlink()
            if bad is not None:
                path.write_bytes(bad)
            with pytest.raises(ArtifactError):
                use_all(toy)
            path.write_bytes(good)
    use_all(toy)


def test_damage_after_opening_is_found_when_read(toy):
    artifact = Artifact.open(toy)
    (toy / "tokenizer/tokenizer.json").write_text("[]")
    with pytest.raises(ArtifactError, match="damaged"):
        artifact.read("tokenizer/tokenizer.json")
    (toy / "tokenizer/tokenizer.json").write_text("[")
    with pytest.raises(ArtifactError, match="ends after 1 of 2"):
        artifact.read("tokenizer/tokenizer.json")
    (toy / "tokenizer/tokenizer.json").unlink()
    (toy / "tokenizer/tokenizer.json").symlink_to("/etc/hostname")
    with pytest.raises(ArtifactError, match="cannot open"):
        artifact.read("tokenizer/tokenizer.json")
    with pytest.raises(ArtifactError, match="has no file"):
        artifact.read("../secret")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../b", "a//b", ".hidden", "a\\b", "", "SEAL", "a/./b"])
def test_paths_that_leave_the_folder(toy, name):
    manifest = Artifact.open(toy).manifest
    reseal(toy, replace(manifest, files=manifest.files | {name: manifests.FileInfo(0, "0" * 64)}))
    with pytest.raises(ArtifactError, match="not a plain relative path"):
        Artifact.open(toy)


def test_foreign_things_in_the_folder(toy):
    (toy / "ir").mkdir()
    (toy / "ir/extra.txt").write_text("")
    with pytest.raises(ArtifactError, match="not part of it: ir/extra.txt"):
        Artifact.open(toy)
    (toy / "ir/extra.txt").unlink()
    (toy / "ir/link").symlink_to("..")
    with pytest.raises(ArtifactError, match="link or a special file"):
        Artifact.open(toy)
    (toy / "ir/link").unlink()
    os.mkfifo(toy / "ir/pipe")
    with pytest.raises(ArtifactError, match="link or a special file"):
        Artifact.open(toy)
    (toy / "ir/pipe").unlink()
    shutil.move(toy / "tokenizer", toy.parent / "tokenizer")
    (toy / "tokenizer").symlink_to(toy.parent / "tokenizer")
    with pytest.raises(ArtifactError, match="link or a special file"):
        Artifact.open(toy)


def test_things_that_are_no_artifact(tmp_path, toy):
    with pytest.raises(ArtifactError, match="no such folder"):
        Artifact.open(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="cannot open .*SEAL"):
        Artifact.open(tmp_path / "empty")
    seal_text = (toy / "SEAL").read_text()
    for bad in ("", "x" * 64 + "\n", seal_text[:-1], seal_text * 9):
        (toy / "SEAL").write_text(bad)
        with pytest.raises(ArtifactError, match="SEAL"):
            Artifact.open(toy)
    (toy / "SEAL").unlink()
    os.mkfifo(toy / "SEAL")
    with pytest.raises(ArtifactError):
        Artifact.open(toy)


def test_manifest_that_does_not_fit_the_files(toy):
    manifest = Artifact.open(toy).manifest
    some = manifest.files["kernels/kernels.so"]
    for changed, message in [
        (replace(manifest, weights=replace(manifest.weights, file="w")), "does not list 'w'"),
        (replace(manifest, weights=replace(manifest.weights, bytes=128)), "is not the 192 bytes"),
        (replace(manifest, files=manifest.files | {"kernels/kernels.so": replace(some, blake3="0")}), "BLAKE3 in hex"),
        (replace(manifest, files=manifest.files | {"kernels/kernels.so": replace(some, bytes=1)}), "records 1"),
        (replace(manifest, files=manifest.files | {"kernels/other.so": some}), "lacks kernels/other.so"),
    ]:
        reseal(toy, changed)
        with pytest.raises(ArtifactError, match=message):
            Artifact.open(toy)
    # A data offset that the weights' own header contradicts.
    shifted = replace(manifest.weights, data_offset=64, bytes=128)
    reseal(toy, replace(manifest, weights=shifted))
    with pytest.raises(ArtifactError, match="data section starts at 128"):
        Artifact.open(toy).load_weights()
    with pytest.raises(ArtifactError, match="has its data at 128"):
        seal(toy, replace(manifest, weights=shifted))


@pytest.mark.parametrize("driver", manifests.FOREIGN)
def test_what_other_programs_run_is_refused(toy, driver):
    artifact = Artifact.open(toy)
    there = Artifact(toy, replace(artifact.manifest, chip=replace(artifact.manifest.chip, name="other", driver=driver)))
    with pytest.raises(ArtifactError, match="chip other, which this runtime has no device for"):
        there.check_chip()


def test_files_of_code_must_be_there(toy):
    manifest = Artifact.open(toy).manifest
    wasm = replace(manifest, chip=replace(manifest.chip, driver="wasm"))
    source = replace(manifest, chip=replace(manifest.chip, driver="opencl"), kernels=tuple(
        replace(k, launch=manifests.Launch("kernels/one.cl", 64, 0, 0, 1)) for k in manifest.kernels))
    for changed, file in ((wasm, "kernels/kernels.wasm"), (source, "kernels/one.cl")):
        with pytest.raises(ArtifactError, match=f"does not list '{file}'"):
            Artifact(toy, changed)._check_files()


def test_other_chips_are_refused(toy, tmp_path):
    chip = toy_manifest()["chip"]
    write_toy(tmp_path / "other", b"x", {"chip": chip | {"triple": "riscv64-linux-gnu"}})
    with pytest.raises(ArtifactError, match="riscv64"):
        Artifact.open(tmp_path / "other")
    write_toy(tmp_path / "newer", b"x", {"chip": chip | {"features": ["avx9000"]}})
    with pytest.raises(ArtifactError, match="lacks avx9000"):
        Artifact.open(tmp_path / "newer")
    assert Artifact.open(tmp_path / "newer", check_chip=False).manifest.chip.features == ("avx9000",)


def test_publish_replaces_an_artifact_and_nothing_else(tmp_path):
    final = tmp_path / "out" / "model"
    for round_ in (b"one", b"two"):
        with staging(final) as folder:
            write_toy(folder / "x", round_)
            publish(folder / "x", final)
        assert Artifact.open(final).read("kernels/kernels.so") == round_
        assert os.listdir(final.parent) == ["model"]
    (tmp_path / "home").mkdir()
    (tmp_path / "home/letters").write_text("dear")
    write_toy(tmp_path / "new", b"x")
    for precious in (tmp_path / "home", tmp_path / "home/letters"):
        with pytest.raises(ArtifactError, match="not an artifact"):
            publish(tmp_path / "new", precious)
    assert (tmp_path / "home/letters").read_text() == "dear"
    with pytest.raises(ArtifactError, match="not sealed"):
        publish(tmp_path / "home", tmp_path / "elsewhere")


def test_staging_is_removed_on_failure_and_after_kills(tmp_path):
    final = tmp_path / "model"
    with pytest.raises(RuntimeError):
        with staging(final) as folder:
            (folder / "half").write_text("")
            raise RuntimeError
    assert os.listdir(tmp_path) == []
    # Two runs at once leave each other alone; what a killed run left goes.
    with staging(final) as first:
        (tmp_path / ".model.staging-dead").mkdir()
        with staging(final) as second:
            assert first.exists() and second.exists()
            assert not (tmp_path / ".model.staging-dead").exists()


def test_a_crash_between_two_renames_is_repaired(tmp_path):
    final = tmp_path / "model"
    write_toy(final, b"old")
    final.rename(tmp_path / ".model.old-1234")
    with staging(final):
        assert Artifact.open(final).read("kernels/kernels.so") == b"old"


def test_a_failing_rename_puts_the_old_one_back(tmp_path, monkeypatch):
    write_toy(tmp_path / "model", b"old")
    write_toy(tmp_path / "new", b"new")
    rename = Path.rename

    def fail_for_new(self, target):
        if self.name == "new":
            raise OSError("disk on fire")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_new)
    with pytest.raises(OSError, match="fire"):
        publish(tmp_path / "new", tmp_path / "model")
    assert Artifact.open(tmp_path / "model").read("kernels/kernels.so") == b"old"
