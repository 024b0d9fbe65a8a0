"""What N ranks save, M ranks load bit for bit; and when one of them fails, all know, none waits, and nothing is lost."""

import errno
import json
import os
import pickle
import resource
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tiny import watch_file_operations
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from engram_lm.errors import CheckpointError, MismatchError
from engram_lm.train import divided
from engram_lm.train.checkpoint import Checkpoint, checksum, latest, save
from engram_lm.train.ranks import Ranks

FACTS = {"name": "Größe"}
WORLDS = [1, 2, 3, 4]


# --- what is saved ------------------------------------------------------------------------------------------


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Distinct ones, among them those that compare badly."""
    count = torch.Size(shape).numel()
    values = torch.arange(1.0, count + 1).div(7).mul(1000)
    if dtype.is_floating_point and count > 3:
        values[:3] = torch.tensor([float("nan"), -0.0, -float("inf")])
    return values.to(dtype).view(shape)


ONE, TWO = "one", "two"  # dimensions of the mesh
WHOLE: dict[str, tuple[Tensor, str | None, tuple[Any, ...]]] = {
    "rows.uneven": (numbers(7, 3), ONE, (Shard(0),)),
    "rows.even": (numbers(12, 2), ONE, (Shard(0),)),
    "rows.few": (numbers(2, 5, dtype=torch.bfloat16), ONE, (Shard(0),)),
    "rows.one": (numbers(1, dtype=torch.int64), ONE, (Shard(0),)),
    "rows.none": (numbers(0, 4), ONE, (Shard(0),)),
    "columns": (numbers(3, 7), ONE, (Shard(1),)),
    "copies": (numbers(4, 4), ONE, (Replicate(),)),
    "copies.scalar": (torch.tensor(2.5), ONE, (Replicate(),)),
    "grid": (numbers(5, 6), TWO, (Shard(0), Shard(1))),
    "grid.few": (numbers(1, 3, dtype=torch.bfloat16), TWO, (Shard(0), Shard(1))),
    "grid.same": (numbers(7, 2), TWO, (Shard(0), Shard(0))),
    "experts": (numbers(6, 4, 3), TWO, (Replicate(), Shard(0))),
    "plain": (numbers(5, 3), None, ()),
    "plain.turned": (numbers(5, 3, dtype=torch.float64).T, None, ()),
    "plain.scalar": (torch.tensor(0.1), None, ()),
    "plain.count": (torch.tensor(2**60 + 1), None, ()),
    "plain.none": (numbers(0), None, ()),
    "plain.bool": (torch.tensor([True, False]), None, ()),
}
SIMPLE = {"weight": numbers(7, 3), "bias": numbers(5)}


def meshes() -> dict[str | None, DeviceMesh]:
    world = dist.get_world_size()
    rows = 2 if world % 2 == 0 else 1
    return {ONE: init_device_mesh("cpu", (world,)), TWO: init_device_mesh("cpu", (rows, world // rows))}


def held(whole: Callable[[Tensor], Tensor] = Tensor.clone) -> dict[str, Tensor]:
    """This rank's part of everything."""
    mesh = meshes()
    return {
        name: distribute_tensor(whole(tensor), mesh[where], placements, src_data_rank=None) if where else whole(tensor)
        for name, (tensor, where, placements) in WHOLE.items()
    }


def bits(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.dtype, local.shape, local.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def all_ranks() -> Ranks:
    return Ranks(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)


def add_file(directory: Path) -> None:
    """What a table in pieces does."""
    place = directory / f"table-{dist.get_rank()}-of-{dist.get_world_size()}"
    place.mkdir()
    (place / "table.safetensors").write_bytes(bytes([dist.get_rank()]) * 100)


def save_all(directory: str) -> str:
    parts = {"model": held(), "optimizer": {"momentum": held()["rows.uneven"]}}
    return save(Path(directory), 4, parts, FACTS, also=add_file, ranks=all_ranks()).name


def load_all(path: str) -> list[str]:
    """Names whose bits are not those that were saved, or that did not stay the tensor that was to be filled."""
    tensors = held(torch.zeros_like)
    before = {name: tensor.to_local() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}
    Checkpoint(Path(path), all_ranks()).load_into("model", tensors)
    expected = held()
    return [
        name
        for name in WHOLE
        if bits(tensors[name]) != bits(expected[name]) or bits(before[name]) != bits(expected[name])
    ]


@pytest.fixture(scope="module")
def saved_by(processes: ForkServerContext, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The checkpoint that so many ranks saved; not to be altered."""
    found: dict[int, Path] = {}

    def saved(world: int) -> Path:
        if world not in found:
            directory = tmp_path_factory.mktemp(f"by-{world}")
            run_ranks(processes, world, save_all, str(directory))
            found[world] = directory / "step-000004"
        return found[world]

    return saved


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("savers", WORLDS)
def test_any_number_of_ranks_loads_what_any_other_saved(processes, saved_by, savers, world):
    assert run_ranks(processes, world, load_all, str(saved_by(savers))) == [[]] * world


@pytest.mark.parametrize("savers", WORLDS)
def test_one_process_without_a_group_gets_whole_tensors(saved_by, savers):
    opened = Checkpoint(saved_by(savers))
    assert opened.facts == {"step": 4, **FACTS}
    part = opened.part("model")
    assert {name: bits(tensor) for name, tensor in part.items()} == {
        name: bits(whole) for name, (whole, *_) in WHOLE.items()
    }
    filled = {name: torch.zeros_like(whole) for name, (whole, *_) in WHOLE.items()}
    opened.load_into("model", filled)
    assert {name: bits(tensor) for name, tensor in filled.items()} == {name: bits(part[name]) for name in part}
    assert opened.part("optimizer").keys() == {"momentum"}


def test_the_files_of_several_ranks(saved_by):
    path = saved_by(3)
    names = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    assert names == {
        "facts.json",
        "manifest.json",
        *(
            f"{part}/{name}"
            for part in ("model", "optimizer")
            for name in (".metadata", *map("__{}_0.distcp".format, range(3)))
        ),
        *(f"table-{rank}-of-3/table.safetensors" for rank in range(3)),
    }
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest == {name: checksum(path / name) for name in names - {"manifest.json"}}
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def save_plain(directory: str, count: int) -> None:
    save(Path(directory), 1, {"model": {"plain": torch.ones(count), "more": torch.ones(count)}}, {}, ranks=all_ranks())


def test_what_all_ranks_have_is_written_once(processes, tmp_path):
    run_ranks(processes, 4, save_plain, str(tmp_path), 1 << 16)
    sizes = [file.stat().st_size for file in tmp_path.rglob("*.distcp")]
    assert 2 * (4 << 16) < sum(sizes) < 2.1 * (4 << 16)
    assert sum(size > 4 << 16 for size in sizes) == 2  # and not all by the same rank


def save_simple(directory: str, *steps: int, keep: int = 9) -> None:
    for step in steps:
        save(Path(directory), step, {"model": simple()}, FACTS, keep, also=add_file, ranks=all_ranks())
        assert latest(Path(directory)) == Path(directory) / f"step-{step:06d}"  # nobody returns before


def simple(whole: Callable[[Tensor], Tensor] = Tensor.clone) -> dict[str, Tensor]:
    return {"weight": rows_of(whole(SIMPLE["weight"])), "bias": whole(SIMPLE["bias"])}


def rows_of(whole: Tensor) -> DTensor:
    """Shard(0), as `distribute_tensor` does it, but that imports torch._dynamo."""
    chunks = [*whole.chunk(dist.get_world_size()), *[whole[:0]] * dist.get_world_size()]
    return DTensor.from_local(
        chunks[dist.get_rank()], meshes()[ONE], (Shard(0),), shape=whole.shape, stride=whole.stride()
    )


def save_and_prune(directory: str) -> None:
    save_simple(directory, 2, 4, 6, 8, keep=2)
    save_simple(directory, 8, keep=2)  # again, as a run would after damage


def test_only_the_newest_are_kept(processes, tmp_path):
    run_ranks(processes, 2, save_and_prune, str(tmp_path))
    assert names(tmp_path) == ["step-000006", "step-000008"]
    assert_whole(tmp_path / "step-000008")


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def assert_whole(path: Path) -> None:
    opened = Checkpoint(path)
    assert opened.facts == {"step": int(path.name[-6:]), **FACTS}
    assert {name: bits(found) for name, found in opened.part("model").items()} == {
        k: bits(v) for k, v in SIMPLE.items()
    }


# --- models under FSDP2 -------------------------------------------------------------------------------------


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3, bias=False))


def divided_network(seed: int) -> nn.Sequential:
    model = network(seed)
    fully_shard(model[0], mesh=meshes()[ONE])
    return fully_shard(model, mesh=meshes()[ONE], reshard_after_forward=False)  # type: ignore[return-value]


def save_network(directory: str) -> None:
    model = divided_network(seed=1)
    model(torch.ones(2, 5)).sum().backward()  # parts of it are whole now
    save(Path(directory), 2, {"model": model.state_dict()}, {}, ranks=all_ranks())


def load_network(path: str) -> bytes:
    model = divided_network(seed=2)
    Checkpoint(Path(path), all_ranks()).load_into("model", model.state_dict())
    return bits(model(torch.ones(2, 5)).detach())[2]


@pytest.mark.parametrize(("savers", "world"), [(1, 3), (2, 3), (3, 2), (4, 1)])
def test_a_divided_model_goes_on_in_other_parts(processes, tmp_path, savers, world):
    run_ranks(processes, savers, save_network, str(tmp_path))
    expected = bits(network(seed=1)(torch.ones(2, 5)).detach())[2]
    assert run_ranks(processes, world, load_network, str(tmp_path / "step-000002")) == [expected] * world


# --- how much is read ---------------------------------------------------------------------------------------


def count_what_is_read(path: str) -> dict[str, int]:
    """Numbers that this rank takes out of a safetensors file, by tensor."""
    counts: dict[str, int] = {}

    class Counting:
        def __init__(self, file: Any, name: str) -> None:
            self.file, self.name = file, name

        def __getitem__(self, key: Any) -> Tensor:
            taken = self.file.get_slice(self.name)[key]
            counts[self.name] = counts.get(self.name, 0) + taken.numel()
            return taken

    fill = divided._fill_from_file

    def counting(file: Any, name: str, tensor: Tensor) -> None:
        whole = SimpleNamespace(
            get_slice=lambda name: Counting(file, name), get_tensor=lambda name: Counting(file, name)[...]
        )
        fill(whole, name, tensor)

    divided._fill_from_file = counting
    try:
        Checkpoint(Path(path), all_ranks()).load_into("model", simple(torch.zeros_like))
    finally:
        divided._fill_from_file = fill
    return counts


def test_a_rank_reads_its_own_rows_out_of_a_file(processes, tmp_path):
    run_ranks(processes, 1, save_simple, str(tmp_path), 2)
    counts = run_ranks(processes, 4, count_what_is_read, str(tmp_path / "step-000002"))
    assert [found["weight"] for found in counts] == [6, 6, 6, 3]
    assert all(found["bias"] == 5 for found in counts)


# --- another model's ----------------------------------------------------------------------------------------


def load_another(path: str, changes: list[dict[str, Any]]) -> list[tuple[str, bool]]:
    """What loading into other tensors than those that were saved says, and whether it left them as they were."""
    opened, outcomes = Checkpoint(Path(path), all_ranks()), []
    for changed in changes:
        shapes = {name: whole.shape for name, whole in SIMPLE.items()} | changed
        tensors: dict[str, Tensor] = {name: torch.zeros(shape) for name, shape in shapes.items() if shape is not None}
        tensors["weight"] = rows_of(tensors["weight"])
        with pytest.raises(MismatchError) as raised:
            opened.load_into("model", tensors)
        outcomes.append((str(raised.value), all(not any(bits(tensor)[2]) for tensor in tensors.values())))
    return outcomes


OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"scale": (3,)}, "it lacks scale."),
    ({"bias": None}, "it has, and this model does not, bias."),
    ({"bias": None, "scale": ()}, "it lacks scale; it has, and this model does not, bias."),
    ({"weight": (3, 7)}, "it has another shape of weight ([7, 3], not [3, 7])."),
    ({"weight": (7, 3, 1)}, "it has another shape of weight ([7, 3], not [7, 3, 1])."),
    ({f"more.{number}": () for number in range(9)}, "it lacks more.0, more.1, more.2, more.3, more.4 and 4 more."),
]


@pytest.mark.parametrize("savers", [1, 2])
def test_what_does_not_fit_is_named(processes, tmp_path, savers):
    run_ranks(processes, savers, save_simple, str(tmp_path), 2)
    path = tmp_path / "step-000002"
    for outcomes in run_ranks(processes, 2, load_another, str(path), [changed for changed, _ in OTHERS]):
        for (message, untouched), (_, says) in zip(outcomes, OTHERS, strict=True):
            assert message.startswith(f"rank 0: {path / 'model'}")
            assert message.endswith(f" belongs to another model: {says} Nothing of it was loaded.")
            assert untouched


# --- damage -------------------------------------------------------------------------------------------------


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]


DAMAGE: list[Callable[[Path], Any]] = [
    lambda path: path.write_bytes(flip(path.read_bytes())),
    lambda path: path.write_bytes(path.read_bytes()[:-1]),
    lambda path: path.unlink(),
]


def open_damaged(directory: str) -> list[tuple[str, str]]:
    """What opening says after any damage to any file, alone and together with others; with the file's name."""
    newest, outcomes = Path(directory) / "step-000004", []
    for file in [path for path in sorted(newest.rglob("*")) if path.is_file()]:
        kept = file.read_bytes()
        for damage in DAMAGE:
            dist.barrier()
            if dist.get_rank() == 0:
                damage(file)
            dist.barrier()
            alone, together = refusal(lambda: Checkpoint(newest)), refusal(lambda: Checkpoint(newest, all_ranks()))
            outcomes += [(alone, file.name), (together, file.name)]
            dist.barrier()
            if dist.get_rank() == 0:
                file.write_bytes(kept)
    return outcomes


def refusal(work: Callable[[], Any]) -> str:
    """How a CheckpointError is worded; "" where there is none."""
    try:
        work()
    except CheckpointError as error:
        return str(error)
    return ""


def test_damage_is_noticed_by_all_ranks(processes, tmp_path):
    run_ranks(processes, 2, save_simple, str(tmp_path), 2, 4)
    for outcomes in run_ranks(processes, 3, open_damaged, str(tmp_path)):
        assert len(outcomes) == 2 * 3 * 7
        for message, name in outcomes:
            assert f"Remove {tmp_path / 'step-000004'} to go on from step-000002." in message
            assert name in message or name == "manifest.json"  # whose damage may show in any file
    assert_whole(tmp_path / "step-000004")


def unreadable(path: str) -> str:
    """What all ranks say when one cannot read its part, after the checksums were found right."""
    opened = Checkpoint(Path(path), all_ranks())
    if dist.get_rank() == 1:
        FileSystem.create_stream = fails(errno.EIO)  # type: ignore[method-assign]
    return refusal(lambda: opened.load_into("model", simple(torch.zeros_like)))


def test_a_part_that_one_rank_cannot_read(processes, tmp_path):
    run_ranks(processes, 2, save_simple, str(tmp_path), 2)
    for message in run_ranks(processes, 3, unreadable, str(tmp_path / "step-000002")):
        assert "step-000002/model: cannot be read ([Errno 5] Input/output error)." in message


class Intruder:
    """A pickle of it does as it likes."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("intruded",)


def test_opening_a_checkpoint_runs_nothing_of_it(processes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_ranks(processes, 2, save_simple, str(tmp_path), 2)
    path = tmp_path / "step-000002"
    (path / "model" / ".metadata").write_bytes(pickle.dumps(Intruder()))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["model/.metadata"] = checksum(path / "model" / ".metadata")
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"step-000002/model: cannot be read \(it asks for posix.mkdir"):
        Checkpoint(path).part("model")
    with pytest.raises(CheckpointError, match=r"it asks for posix.mkdir"):
        Checkpoint(path).load_into("model", SIMPLE)
    assert names(tmp_path) == ["step-000002"]


def test_what_torch_has_renamed_in_its_metadata_would_be_noticed():
    """Everything that is let through exists."""
    for module, name in divided.DESCRIPTION:
        assert hasattr(__import__(module, fromlist=[name]), name)


# --- a rank that fails --------------------------------------------------------------------------------------


def fails(number: int) -> Callable[..., Any]:
    def failing(*args: Any, **kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return failing


def full_in_also() -> Callable[[Path], None]:
    return fails(errno.ENOSPC)


def full_in_dcp() -> Callable[[Path], None]:
    FileSystem.create_stream = fails(errno.ENOSPC)  # type: ignore[method-assign]
    return add_file


def full_for_the_system() -> Callable[[Path], None]:
    """The system itself cuts files short."""
    write = divided._Writer.write_data

    def limited(*args: Any) -> Any:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        try:
            return write(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    divided._Writer.write_data = limited  # type: ignore[method-assign]
    return add_file


def mistaken_in_also() -> Callable[[Path], None]:
    return {}.__getitem__


def save_while_one_fails(
    directory: str, failing: int, how: Callable[[], Callable[[Path], None]]
) -> tuple[str, list[str]]:
    """What a rank says of a save that fails, and what is there at that moment; then all save again."""
    place, tensors = Path(directory), simple()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileSystem, "create_stream", FileSystem.create_stream)  # as they are, to be put back
        patch.setattr(divided._Writer, "write_data", divided._Writer.write_data)
        also = how() if dist.get_rank() == failing else add_file
        message = refusal(lambda: save(place, 4, {"model": tensors}, FACTS, also=also, ranks=all_ranks()))
    present = names(place)
    dist.barrier()
    save_simple(directory, 6)
    return message, present


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (full_in_also, "[Errno 28] No space left on device"),
        (full_in_dcp, "[Errno 28] No space left on device"),
        (full_for_the_system, "[Errno 27] File too large"),
        (mistaken_in_also, "KeyError: PosixPath"),
    ],
)
def test_what_fails_on_one_rank_is_raised_on_all(processes, tmp_path, failing, how, reason):
    run_ranks(processes, 3, save_simple, str(tmp_path), 2)
    for message, present in run_ranks(processes, 3, save_while_one_fails, str(tmp_path), failing, how):
        assert message.startswith(f"{tmp_path / 'step-000004'}: cannot be written (rank {failing}: {reason}")
        assert message.endswith("The checkpoint before it, step-000002, is intact.")
        assert "; rank" not in message
        assert present == ["step-000002"]
    assert names(tmp_path) == ["step-000002", "step-000006"]
    assert_whole(tmp_path / "step-000006")


def save_facts(directory: str) -> str:
    what = {"what": object()}
    return refusal(lambda: save(Path(directory), 2, {"model": simple()}, what, also=add_file, ranks=all_ranks()))


def test_facts_that_are_not_json(processes, tmp_path):
    for message in run_ranks(processes, 2, save_facts, str(tmp_path)):
        assert "cannot be written (rank 0: TypeError: Object of type object is not JSON" in message
        assert message.endswith("There is no earlier checkpoint.")


def save_apart(directory: str) -> str:
    return refusal(lambda: save_simple(f"{directory}/{dist.get_rank()}", 2))


def test_ranks_that_do_not_see_the_same_files_are_told(processes, tmp_path):
    for message in run_ranks(processes, 2, save_apart, str(tmp_path)):
        assert "cannot be written (rank 1: [Errno 2] No such file or directory: " in message
    assert latest(tmp_path / "0") is None


def save_with_ever_more_room(directory: str, failing: int) -> list[tuple[str, int]]:
    """A rank's first, second, third ... operation on a file finds the disk full: what it said, and the newest step then."""
    place, step, left, outcomes = Path(directory), 2, 0, []
    tensors, ranks = simple(), all_ranks()

    def count() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if ranks.rank == failing:
        watch_file_operations(count)
    unused = 0
    while unused <= 0:  # until a save has room for all
        step, left = step + 1, step
        message = refusal(lambda: save(place, step, {"model": tensors}, FACTS, 1, also=add_file, ranks=ranks))  # noqa: B023
        unused, left = ranks.everyones(left)[failing], 0
        kept = latest(place)
        assert kept is not None
        outcomes.append((message, Checkpoint(kept, ranks).facts["step"]))
        dist.barrier()
    return outcomes


@pytest.mark.parametrize("failing", [0, 1])
def test_a_disk_that_is_full_at_any_moment(processes, tmp_path, failing):
    """All ranks come to the same, and the newest checkpoint is whole: the one of this save, or the one before it."""
    run_ranks(processes, 2, save_simple, str(tmp_path), 2)
    one, other = run_ranks(processes, 2, save_with_ever_more_room, str(tmp_path), failing)
    assert one == other
    assert sum(bool(message) for message, _ in one) > 5
    kept = 2
    for step, (message, newest) in enumerate(one, start=3):
        if "cannot be written" in message:
            assert f"rank {failing}: [Errno 28] No space left on device" in message
            assert newest in (kept, step)
        else:
            assert newest == step
        kept = newest
    assert one[-1] == ("", kept)
    assert_whole(tmp_path / f"step-{kept:06d}")


# --- a rank that is killed ----------------------------------------------------------------------------------


def save_until_killed(directory: str, failing: int, number: int) -> None:
    """One rank dies just before its `number`-th operation on a file."""
    left = number
    tensors, ranks = simple(), all_ranks()

    def note() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    if dist.get_rank() == failing:
        watch_file_operations(note)
    save(Path(directory), 4, {"model": tensors}, FACTS, keep=1, also=add_file, ranks=ranks)


@pytest.mark.parametrize(("failing", "moments"), [(0, range(1, 200, 2)), (1, range(1, 200))])
def test_a_rank_killed_during_a_save_leaves_a_whole_checkpoint(processes, tmp_path, failing, moments):
    """The old or the new one; and the next save clears away what is left."""
    run_ranks(processes, 2, save_simple, str(tmp_path / "first"), 2)
    newest = []
    for number in moments:
        directory = tmp_path / str(number)
        shutil.copytree(tmp_path / "first", directory)
        with suppress(RuntimeError):
            run_ranks(processes, 2, save_until_killed, str(directory), failing, number)
        kept = latest(directory)
        assert kept is not None
        assert_whole(kept)
        newest.append(kept.name)
        if newest.count("step-000004") == 2:
            break
    assert newest.count("step-000002") > 4
    assert newest == sorted(newest)
    run_ranks(processes, 2, save_simple, str(tmp_path / "5"), 6)
    assert names(tmp_path / "5") == ["step-000002", "step-000006"]
