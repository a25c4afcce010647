"""Checkpoints: a run may be ended at any moment, and goes on from what is on disk, on this mesh or on another.

    folder/step-000120/checkpoint.json          counters, hyperparameters, what the caller adds
                       shard-00001-....safetensors   what the first rank wrote, with where it lies in whole tensors
    folder/.step-000130/                        a save that is under way, or was cut off

Files hold boxes of whole tensors: who loads reads whatever overlaps with boxes of its own, so the layout may change.
torch.distributed.checkpoint finds the overlaps. It would pickle its plans and metadata: here no rank plans for others,
and metadata are the headers of the safetensors files. Nothing is ever unpickled.

A checkpoint is there once its folder has its name, and that is one rename, after everything else. All ranks must see
the same folder. The caller's random numbers are not kept, an optimizer must work element by element, and stages that
`wrap` has sharded are refused.
"""

import json
import os
import re
import shutil
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice, product
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor

from . import interop
from .collectives import all_gather, everyone
from .cut import cuts
from .train import Parallel
from .world import here

PAGE = "checkpoint.json"
FORMAT = 1
WORDS = 1000  # bytes of an answer or an error that ranks tell each other

# -- what a rank holds of a tensor -----------------------------------------------------------------------------

Shape = tuple[int, ...]
Run = tuple[int, int, int]  # start in the share, start in the whole, length


@dataclass
class Piece:
    """What a rank holds of a whole tensor: boxes maps offsets in the whole to views of what lies there."""

    shape: Shape
    dtype: torch.dtype
    boxes: dict[Shape, Tensor]


def places(model: Parallel, name: str) -> list[list[Run]]:
    """Where this rank's share of a parameter lies in the whole: runs for each dim."""
    runs = [[(0, 0, size)] for size in model.shapes[name]]
    for cut in cuts(model.here[name]):
        runs[cut.dim] = consecutive(cut.shares[cut.axis.index].tolist())
    return runs


def consecutive(places: list[int]) -> list[Run]:
    """[3, 4, 8] -> [(0, 3, 2), (2, 8, 1)]"""
    starts = [i for i, place in enumerate(places) if i == 0 or place != places[i - 1] + 1]
    return [(a, places[a], b - a) for a, b in zip(starts, [*starts[1:], len(places)], strict=True)]


def boxes(shape: Shape, start: int, stop: int) -> Iterator[tuple[Shape, Shape]]:
    """The elements from start to stop of a tensor, counted row by row, as boxes (offsets, sizes), in their order: the
    rest of a row, whole rows, the beginning of a row. At most 2n - 1 for n dims."""
    if start == stop:
        return
    if not shape:
        yield (), ()
        return
    row = prod(shape[1:])
    first, end = -(-start // row), stop // row  # the whole rows

    def within(i: int, start: int, stop: int) -> Iterator[tuple[Shape, Shape]]:
        for offsets, sizes in boxes(shape[1:], start - i * row, stop - i * row):
            yield (i, *offsets), (1, *sizes)

    if first > end:
        yield from within(end, start, stop)
        return
    yield from within(first - 1, start, first * row)
    if first < end:
        yield (first, *(0 for _ in shape[1:])), (end - first, *shape[1:])
    yield from within(end, end * row, stop)


def piece(model: Parallel, name: str, owned: Tensor) -> Piece:
    """owned: this rank's part of a parameter, or of something that is cut as it is."""
    if isinstance(owned, DTensor):
        raise ValueError(
            f"{name!r} is a DTensor, such as fully_shard makes: zero=3 shards in a way that can be saved, and "
            "save_weights writes the weights of any layout"
        )
    runs = places(model, name)
    share = tuple(sum(length for *_, length in some) for some in runs)
    start = model.units[name].start(name) if name in model.units else 0
    owned, found, end = owned.detach(), {}, 0
    for offsets, sizes in boxes(share, start, start + owned.numel()):
        begin, end = end, end + prod(sizes)
        box = owned if owned.shape == share else owned[begin:end].view(sizes)
        for some in product(*map(_overlaps, runs, offsets, sizes)):
            found[tuple(at for at, _ in some)] = box[tuple(where for _, where in some)]
    return Piece(tuple(model.shapes[name]), owned.dtype, found)


def _overlaps(runs: list[Run], offset: int, size: int) -> Iterator[tuple[int, slice]]:
    """Along one dim, for each run that a box meets: (offset in the whole, where in the box)."""
    for start, place, length in runs:
        first, end = max(start, offset), min(start + length, offset + size)
        if first < end:
            yield place + first - start, slice(first - offset, end - offset)


def whole(x: Tensor) -> Piece:
    """All of a tensor."""
    return Piece(tuple(x.shape), x.dtype, {(0,) * x.dim(): x.detach()})


# -- names in the files ----------------------------------------------------------------------------------------
#
#   model/blocks.0.norm1.weight                 a parameter or buffer
#   optimizer/exp_avg/blocks.0.norm1.weight     a state that has the parameter's shape
#   scalar/step/blocks.0.norm1.weight           a state that is one number


def _model_pieces(model: Parallel) -> dict[str, Piece]:
    found = {f"model/{name}": piece(model, name, p) for name, p in model.named_parameters()}
    return found | {f"model/{key}": whole(x) for key, x in model.buffers_here().items()}


def _optimizer_pieces(model: Parallel, optimizer: torch.optim.Optimizer) -> dict[str, Piece]:
    """ValueError for a state that is neither of the parameter's shape nor one number."""
    found = {}
    for name, p in model.named_parameters():
        for what, x in optimizer.state.get(p, {}).items():
            if isinstance(x, Tensor) and x.shape == p.shape and (p.dim() or what != "step"):
                found[f"optimizer/{what}/{name}"] = piece(model, name, x)
            elif isinstance(x, Tensor) and x.dim() == 0:
                found[f"scalar/{what}/{name}"] = whole(x)
            elif x is not None:
                kind = f"a tensor {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
                raise ValueError(
                    f"the state {what!r} of {name!r} in {type(optimizer).__name__} is {kind}: only states with the "
                    f"parameter's shape {tuple(p.shape)}, or of one number (0-d tensors), can be kept"
                )
    return found


def _written(model: Parallel, found: dict[str, Piece]) -> dict[str, Piece]:
    """Those that this rank writes: each box of the mesh is written once, a scalar with the parameter's first box."""

    def mine(key: str) -> bool:
        kind, _, name = key.partition("/")
        name = name if kind == "model" else name.partition("/")[2]
        if name in model.buffers:
            return model.buffer_owner(name) == model.pp.index and model.tp.index == model.replicas.index == 0
        first = (0,) * len(model.shapes[name])
        return model.counts(name) and (kind != "scalar" or first in found[f"model/{name}"].boxes)

    return {key: piece for key, piece in found.items() if mine(key)}


# -- torch.distributed.checkpoint, one rank by itself ----------------------------------------------------------


class Writing(SavePlanner):
    def __init__(self, pieces: dict[str, Piece]):
        self.pieces = pieces

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None: ...

    def create_local_plan(self) -> SavePlan:
        return SavePlan(
            [
                WriteItem(
                    MetadataIndex(key, offsets),
                    WriteItemType.SHARD,
                    tensor_data=TensorWriteData(chunk, TensorProperties(dtype=piece.dtype), torch.Size(piece.shape)),
                )
                for key, piece in self.pieces.items()
                for offsets, chunk in zip(piece.boxes, _chunks(piece), strict=True)
            ]
        )

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        index = write_item.index
        return self.pieces[index.fqn].boxes[_offsets(index)].contiguous()


class Reading(LoadPlanner):
    def __init__(self, pieces: dict[str, Piece]):
        self.pieces = pieces

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        assert metadata
        self.files: Any = metadata.state_dict_metadata

    def create_local_plan(self) -> LoadPlan:
        items = [create_read_items_for_chunk_list(key, self.files[key], _chunks(p)) for key, p in self.pieces.items()]
        return LoadPlan([item for some in items for item in some])

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise ValueError(f"{read_item.storage_index.fqn!r} is no tensor: it would have to be unpickled")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        index = read_item.dest_index
        box = self.pieces[index.fqn].boxes[_offsets(index)]
        return box[tuple(slice(a, a + n) for a, n in zip(read_item.dest_offsets, read_item.lengths, strict=True))]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None: ...


def _chunks(piece: Piece) -> list[ChunkStorageMetadata]:
    return [ChunkStorageMetadata(torch.Size(offsets), box.shape) for offsets, box in piece.boxes.items()]


def _offsets(index: MetadataIndex) -> Shape:
    return tuple(index.offset or ())


class Writer(HuggingFaceStorageWriter):
    """A safetensors file has room for one box of a tensor: second boxes go into a second file, and so on."""

    def __init__(self, folder: Path):
        super().__init__(str(folder), save_distributed=True)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [replace(plan, storage_data={"shard_index": here().rank + 1}) for plan in plans]

    def _split_by_storage_plan(self, storage_plan: Any, items: list[WriteItem]) -> dict[int, list[WriteItem]]:
        files: dict[int, list[WriteItem]] = defaultdict(list)
        seen: Counter[str] = Counter()
        for item in items:
            seen[item.index.fqn] += 1
            files[seen[item.index.fqn]].append(item)
        return files


def _alone(work: Callable[..., Any], **arguments: Any) -> None:
    """dcp.save or dcp.load without talking to other ranks."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is (disabled|unavailable)")
        try:
            work({}, no_dist=True, **arguments)
        except CheckpointException as failed:
            error = next(iter(failed.failures.values()))[0]
            raise error from None


# -- ranks agree -----------------------------------------------------------------------------------------------


def on_all(work: Callable[[], str | None]) -> str:
    """Call `work` on every rank. Returns what it answers on rank 0, and fails on all if it fails on one: no rank is
    left waiting for another that has given up."""
    error, answer = None, ""
    try:
        answer = work() or ""
    except Exception as failed:
        error, answer = failed, f"rank {here().rank}: {type(failed).__name__}: {failed}"
    page = torch.zeros(1, 1 + WORDS, dtype=torch.uint8)
    words = answer.encode()[:WORDS]
    page[0, 0] = error is not None
    page[0, 1 : 1 + len(words)] = torch.tensor(list(words), dtype=torch.uint8)
    pages = all_gather(page.to(here().device), everyone()).cpu()
    if error:
        raise error
    said = [bytes(some.tolist()).rstrip(b"\0").decode(errors="replace") for some in pages[:, 1:]]
    for failed_there, what in zip(pages[:, 0].tolist(), said, strict=True):
        if failed_there:
            raise RuntimeError(what)
    return said[0]


# -- the folder ------------------------------------------------------------------------------------------------


def latest(folder: str | Path) -> Path | None:
    """The newest checkpoint in a folder, or None. What a save that was cut off has left is not one."""
    return next(iter(_newest_first(Path(folder)).values()), None)


def _newest_first(folder: Path) -> dict[tuple[int, int], Path]:
    """The checkpoints by (step, again): step-000120 is (120, 0), another save at that step step-000120.1 (120, 1)."""
    names = {path: re.fullmatch(r"step-(\d+)(?:\.(\d+))?", path.name) for path in folder.glob("step-*")}
    found = {(int(name[1]), int(name[2] or 0)): path for path, name in names.items() if name}
    return dict(sorted(found.items(), reverse=True))


def _begin(folder: Path, step: int) -> str:
    """On rank 0: make room for a new checkpoint. Returns its name."""
    folder.mkdir(parents=True, exist_ok=True)
    for cut_off in folder.glob(".step-*"):
        shutil.rmtree(cut_off)
    name = f"step-{step:06d}"
    for (last, again), newest in islice(_newest_first(folder).items(), 1):
        if last > step:
            raise ValueError(f"{folder} has {newest.name}, and this run is at step {step}: load it, or choose another")
        if last == step:
            name += f".{again + 1}"
    (folder / f".{name}").mkdir()
    return name


def _finish(folder: Path, name: str, page: dict[str, Any], model: Parallel, keep: int) -> None:
    """On rank 0, when all have written: let it be a checkpoint, then remove older ones."""
    part = folder / f".{name}"
    _check_tensors(part, _headers(part), model)
    page["files"] = {file.name: file.stat().st_size for file in sorted(part.glob("*.safetensors"))}
    with open(part / PAGE, "w", encoding="utf-8") as file:
        json.dump(page, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync(part)
    part.rename(folder / name)
    _sync(folder)
    for old in list(_newest_first(folder).values())[keep:]:
        shutil.rmtree(old.rename(folder / f".{old.name}"))


def _sync(folder: Path) -> None:
    """Until a folder is synced, names in it may be lost with the power."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


# -- save and load ---------------------------------------------------------------------------------------------


def save(folder: str | Path, model: Parallel, optimizer: torch.optim.Optimizer, *, keep: int = 2, **extra: Any) -> Path:
    """Write a checkpoint of this step, and return its path. Every rank calls it.

    A kill at any moment leaves the checkpoint before it or this one, whole.
    model: what `parallelize` gave; its counters are kept too, so that dropout goes on as it would have.
    keep: so many checkpoints stay, the newest ones. extra: more to keep, such as `data=loader.state_dict()`: numbers,
    strings, lists and dicts, as JSON has them. Rank 0's is written.
    Raises TypeError for an extra that JSON cannot give back as it is, ValueError for an optimizer of other parameters
    or with states that are not cut as parameters are, or if the folder has a checkpoint of a later step; on the other
    ranks RuntimeError with the same words, as when one cannot write.
    """
    folder = Path(folder)
    mine: dict[str, Piece] = {}
    page: dict[str, Any] = {}

    def begin() -> str | None:
        if type(keep) is not int or keep < 1:
            raise ValueError(f"keep={keep!r}: a whole number, at least 1")
        _check_plain(extra)
        _check_owner(model, optimizer)
        mine.update(_written(model, _model_pieces(model) | _optimizer_pieces(model, optimizer)))
        page.update(
            format=FORMAT,
            mesh=str(model.mesh),
            counters={"steps": model.steps, "seed": model.seed, "scale": asdict(model.scale)},
            optimizer=type(optimizer).__name__,
            groups=[_hyperparameters(group) for group in optimizer.param_groups],
            extra=extra,
        )
        for group in page["groups"]:
            _check_plain(group)
        return _begin(folder, model.steps) if here().rank == 0 else None

    name = on_all(begin)
    on_all(lambda: _alone(dcp.save, storage_writer=Writer(folder / f".{name}"), planner=Writing(mine)))
    on_all(lambda: _finish(folder, name, page, model, keep) if here().rank == 0 else None)
    return folder / name


def load(folder: str | Path, model: Parallel, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Take up the newest checkpoint of a folder, and return what `save` was given as extra. Every rank calls it.

    folder: that `save` was given, or one checkpoint in it. model, optimizer: made as for the run that saved, on any
    mesh and any stage of ZeRO. Without an optimizer only the model is loaded.
    Raises FileNotFoundError if there is no checkpoint, ValueError if it is of another model or optimizer, or not whole;
    on other ranks, where they see no fault themselves, RuntimeError with the same words.
    """
    folder = Path(folder)
    path = folder / on_all(lambda: _find(folder) if here().rank == 0 else None)
    page: dict[str, Any] = {}

    def read() -> None:
        page.update(_read_page(path))
        headers = _headers(path)
        _check_tensors(path, headers, model)
        pieces = _model_pieces(model)
        if optimizer:
            _check_owner(model, optimizer)
            _check_optimizer(path, page, optimizer)
            pieces |= _make_room(model, optimizer, headers)
        _alone(dcp.load, storage_reader=HuggingFaceStorageReader(str(path)), planner=Reading(pieces))
        if optimizer:
            for group, kept in zip(optimizer.param_groups, page["groups"], strict=True):
                _take_up(group, kept)
        model.steps, model.seed = page["counters"]["steps"], page["counters"]["seed"]
        if model.dtype is torch.float16:
            vars(model.scale).update(page["counters"]["scale"])

    on_all(read)
    return page["extra"]


def _find(folder: Path) -> str:
    if (folder / PAGE).exists():
        return "."
    newest = latest(folder)
    if not newest:
        raise FileNotFoundError(f"no checkpoint in {folder}: minipar.latest(folder) asks whether there is one")
    return newest.name


def _read_page(path: Path) -> dict[str, Any]:
    """ValueError if a file is not there in full."""
    try:
        page = json.loads((path / PAGE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path / PAGE} is broken: {error}") from None
    if page.get("format") != FORMAT:
        raise ValueError(f"{path / PAGE} has format {page.get('format')!r}, and this minipar reads {FORMAT}")
    for name, size in page["files"].items():
        file = path / name
        if not file.exists() or file.stat().st_size != size:
            have = f"has {file.stat().st_size} bytes of {size}" if file.exists() else "is missing"
            raise ValueError(f"{path.name} is not whole: {name} {have}")
    return page


def _headers(path: Path) -> dict[str, TensorStorageMetadata]:
    try:
        return HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata  # type: ignore[return-value]
    except Exception as error:  # safetensors has its own
        raise ValueError(f"a file of {path} is broken: {error}") from None


def _check_tensors(path: Path, headers: dict[str, TensorStorageMetadata], model: Parallel) -> None:
    """ValueError if the files have another model, or not all of one."""
    tensors = {f"model/{name}": (model.shapes[name], p.dtype) for name, p in model.everything.items()}
    tensors |= {f"model/{key}": (x.shape, x.dtype) for key, x in model.buffers.items()}
    saved = {key for key in headers if key.startswith("model/")}
    if missing := sorted(tensors.keys() - saved):
        raise ValueError(f"{path.name} has no {_name(missing[0])!r} ({len(missing)} tensors of the model are missing)")
    if strange := sorted(saved - tensors.keys()):
        raise ValueError(f"the model has no {_name(strange[0])!r} ({len(strange)} tensors are not its own)")
    for key, (shape, dtype) in tensors.items():
        have = headers[key]
        if have.size != shape or have.properties.dtype != dtype:
            was, needs = (f"{tuple(s)} {d}" for s, d in ((have.size, have.properties.dtype), (shape, dtype)))
            raise ValueError(f"{_name(key)!r} is {was} in {path.name}, and {needs} in this model")
    for key, have in headers.items():
        there = sum(prod(chunk.sizes) for chunk in have.chunks)
        if there != prod(have.size):
            raise ValueError(f"{path.name} is not whole: {there} of {prod(have.size)} elements of {_name(key)!r}")


def _name(key: str) -> str:
    return key.partition("/")[2]


# -- optimizers ------------------------------------------------------------------------------------------------


def _check_owner(model: Parallel, optimizer: torch.optim.Optimizer) -> None:
    own = {id(p) for p in model.parameters()}
    if any(id(p) not in own for group in optimizer.param_groups for p in group["params"]):
        raise ValueError("the optimizer has parameters that are not the model's: make it of model.parameters()")


def _check_optimizer(path: Path, page: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    kind, groups = type(optimizer).__name__, len(optimizer.param_groups)
    if page["optimizer"] != kind:
        raise ValueError(f"{path.name} is of {page['optimizer']}, and this optimizer is {kind}")
    if len(page["groups"]) != groups:
        raise ValueError(f"{path.name} has {len(page['groups'])} groups of parameters, and this {kind} has {groups}")


def _hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    plain = {Tensor: lambda x: x.item(), tuple: list}
    return {name: plain.get(type(x), lambda x: x)(x) for name, x in group.items() if name != "params"}


def _take_up(group: dict[str, Any], kept: dict[str, Any]) -> None:
    """Hyperparameters, in the types that the optimizer has: JSON knows no tuples and no tensors."""
    for name, value in kept.items():
        now = group.get(name)
        if isinstance(now, Tensor):
            now.fill_(value)
        else:
            group[name] = tuple(value) if isinstance(now, tuple) else value


def _make_room(
    model: Parallel, optimizer: torch.optim.Optimizer, headers: dict[str, TensorStorageMetadata]
) -> dict[str, Piece]:
    """States as the files have them, for every parameter that is updated here. Their values come later."""
    found = {}
    optimizer.state.clear()
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    for key, have in headers.items():
        kind, _, rest = key.partition("/")
        what, _, name = rest.partition("/")
        p = None if kind == "model" else model.owned.get(name)
        if p is None or p not in groups:
            continue
        dtype = have.properties.dtype
        if kind == "optimizer":
            x = optimizer.state[p][what] = torch.zeros_like(p, dtype=dtype, requires_grad=False)
            found[key] = piece(model, name, x)
        else:  # as torch does it: on the CPU, but where a kernel of the device counts the steps
            there = groups[p].get("capturable") or groups[p].get("fused")
            x = optimizer.state[p][what] = torch.zeros((), dtype=dtype, device=p.device if there else "cpu")
            found[key] = whole(x)
    return found


# -- what JSON can hold ----------------------------------------------------------------------------------------


def _check_plain(values: dict[str, Any]) -> None:
    """TypeError for what JSON does not give back as it was: a tensor, a tuple, a dict with numbers for keys."""
    for name, value in values.items():
        try:
            same = repr(json.loads(json.dumps(value))) == repr(value)
        except TypeError:
            same = False
        if not same:
            what = "numbers, strings, lists, and dicts with strings for keys"
            raise TypeError(f"{name!r} does not come back from JSON as it is: use {what}, not {_short(value)}")


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


# -- one file --------------------------------------------------------------------------------------------------


def save_weights(file: str | Path, model: Parallel) -> Path:
    """Write the whole model's weights into one safetensors file, for any program. Every rank calls it.

    Its keys are those of `state_dict()`; a tied weight is there once, under its first key, as in files that
    `safetensors.torch.save_model` writes. The file is there whole or not at all.
    """
    file = Path(file)
    state = model.full_state_dict()
    kept = {model.state_names[key]: key for key in reversed(state)}  # a name's first key

    def write() -> None:
        if here().rank == 0:
            part = file.with_name(f".{file.name}.part")
            save_file({key: state[key].cpu().contiguous() for key in kept.values()}, part, {"format": "pt"})
            with open(part, "rb") as written:
                os.fsync(written.fileno())
            part.replace(file)
            _sync(file.parent)

    on_all(write)
    return file


def load_weights(file: str | Path, model: Parallel) -> None:
    """Take the weights from a safetensors file with the keys of `state_dict()`. Every rank calls it.

    The file is mapped into memory, so that a rank reads what it needs of it. A tied weight may have one of its keys, or
    all. Raises ValueError for a file that is broken or of another model.
    """

    def read() -> None:
        if not Path(file).is_file():
            raise FileNotFoundError(f"there is no file {file}")
        try:
            state: dict[str, Tensor] = load_file(file)
        except Exception as error:  # safetensors has its own
            raise ValueError(f"{file} is broken, or no safetensors file: {error}") from None
        there = {model.state_names[key]: x for key, x in state.items() if key in model.state_names}
        tied = {key: there[name] for key, name in model.state_names.items() if name in there}
        model.load_full_state_dict(tied | state)

    on_all(read)


# -- a folder for transformers ---------------------------------------------------------------------------------

WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")  # names of its files


def save_pretrained(folder: str | Path, model: Parallel) -> Path:
    """Write a model of transformers into a folder that `from_pretrained` loads, on whatever layout it is. Every rank
    calls it.

    The files are those that the model's own `save_pretrained` writes: config.json, generation_config.json and the
    weights, whole, under the names that files of this architecture use. A file of such a name is replaced, others (a
    tokenizer's, say) stay. Weights come before config.json, so a new folder is whole once that is there.
    Raises TypeError for another model.
    """
    folder = Path(folder)
    on_all(lambda: interop.check_saves_itself(model.module))
    state = model.full_state_dict()
    on_cpu = {model.state_names[key]: x.cpu() for key, x in state.items()}  # a tied weight once

    def write() -> None:
        if here().rank == 0:
            part = folder / ".part"
            shutil.rmtree(part, ignore_errors=True)
            weights = {key: on_cpu[name] for key, name in model.state_names.items()}
            interop.save_itself(model.module, model.config, weights, part)
            written = sorted(part.iterdir(), key=lambda file: file.name == "config.json")
            for file in written:
                with open(file, "rb") as whole_file:
                    os.fsync(whole_file.fileno())
                file.replace(folder / file.name)
            part.rmdir()
            for old in {*folder.iterdir()} - {folder / file.name for file in written}:
                if WEIGHTS.fullmatch(old.name):
                    old.unlink()  # of an earlier save, in files of other names
            _sync(folder)

    on_all(write)
    return folder
