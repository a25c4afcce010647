"""Small mistakes planted in the solutions of exercises, one at a time. Does grading notice?

    python tests/mutants.py                       all of them, a line for each that passes
    python tests/mutants.py 03a --sample 5        some of each task of one notebook

An operator, a comparison or a number changes, a call or a statement is left out, arguments change places. What passes
for a good reason (it is another right answer) stands in SURVIVORS with that reason.
"""

import argparse
import ast
import copy
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[1]
SECONDS = 8  # that a check may take: some mistakes wait for ever

SWAPS: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.MatMult: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
}

# What may pass, by task and change, and why.
SURVIVORS = {
    ("02a.4", "2 + 2 + 4 if mixed else 4 + 4 -> 4 + 4 if mixed else 2 + 2 + 4"): "8 bytes both ways",
    ("02b.6", "have < axis.size -> have <= axis.size"): "in the round more, nobody is left to send to",
    (
        "02b.8",
        "(~gradient.isfinite().all()).long() -> ~gradient.isfinite().all()",
    ): "a sum of truth values is true as well",
    (
        "04b.2",
        "torch.linalg.lstsq(rows, torch.ones_like(t)[:, None]).solution.flatten().tolist() -> "
        "torch.linalg.lstsq(rows, torch.ones_like(t)[:, None]).solution.flatten()",
    ): "two numbers all the same",
    ("04b.7", "1000000000000.0 -> 1000000000001.0"): "a data sheet has three digits",
    ("04b.7", "1000000000.0 -> 1000000001.0"): "a data sheet has three digits",
    (
        "04b.8",
        "predict(model, layout, cluster, batch, sequence, exact=False) -> "
        "predict(model, layout, cluster, batch, sequence)",
    ): "simulated in place of estimated, the same layouts win",
    ("04b.8", "False -> True"): "simulated in place of estimated, the same layouts win",
    ("03a.9", "loss.detach() -> loss"): "the same loss; its graph lives on until the step ends",
    ("03a.10", "own.detach() -> own"): "the same weights; the caller detaches them, too",
    ("03c.8", "axis.index % 2 == turn -> axis.index % 2 != turn"): "no deadlock either: one pair after the other",
    ("03c.8", "axis.index % 2 != turn -> axis.index % 2 == turn"): "no deadlock either: one pair after the other",
    ("03c.8", "axis.index % 2 -> axis.index // 2"): "no deadlock either: one pair after the other",
    ("03d.5", "reversed(range(stages)) -> range(stages)"): "a ring in place of a V, par or better, too",
    ("03a.11", "torch.zeros((), dtype=torch.float64) -> torch.zeros(())"): "a zero without dimensions takes any dtype",
    ("03e.1", "torch.logaddexp(lse, more_lse) -> torch.logaddexp(more_lse, lse)"): "the same sum",
    ("05.2", "1 -> 2"): "F1's denominator is 1 only where nothing is right",
    ("05.3", "start:start + batch -> start:"): "of the labels: those behind the batch are not taken",
    ("09.5", "seed * 1000000 + step -> seed * 1000000 - step"): "still another number for each",
    ("09.5", "1000 -> 1001"): "still another number for each",
    ("09.5", "1000000 -> 1000001"): "still another number for each",
    ("09.5", "1 -> 2"): "still another number for each",
    ("09.7", "pending.wait() -> (nothing)"): "the message leaves all the same; its memory is not used again here",
    (
        "10.1",
        "list(model.blocks[depth * stage // stages:depth * (stage + 1) // stages]) -> "
        "model.blocks[depth * stage // stages:depth * (stage + 1) // stages]",
    ): "a part of a ModuleList is one, and can be added to as a list can",
    ("10.4", "4 -> 5"): "more microbatches, the same gradients",
    ("04a.3", "Fraction(0) -> 0"): "the same number",
    ("03h.3", "float(overflow) -> overflow"): "the largest of truth values is as good",
    ("03b.2", "x.view_as(x) -> x"): "autograd makes a view of an input that is returned",
    (
        "03b.4",
        "y.unflatten(-1, (-1, head_dim)).transpose(1, 2) -> y.unflatten(-1, (-1, head_dim)).transpose(2, 1)",
    ): "the same transposition",
    ("03b.4", "y.transpose(1, 2) -> y.transpose(2, 1)"): "the same transposition",
    ("03b.4", "-2 -> 2"): "the same dim of four",
    ("03b.6", "-1 -> 1"): "the same dim of two",
    (
        "03b.8",
        "torch.rand(shape, generator=draw) >= p -> torch.rand(shape, generator=draw) > p",
    ): "p itself is not drawn",
    ("03g.5", "norm > max_norm -> norm >= max_norm"): "a factor of one",
    ("03g.6", "loss.detach() -> loss"): "the same loss; its graph lives on until the step ends",
}


def changes(node: ast.AST) -> Iterator[ast.AST | None]:
    """What may stand in the place of a node. None: nothing (a statement is left out)."""
    if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp) and type(node.op) in SWAPS:
        yield _with(node, op=SWAPS[type(node.op)]())
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        yield _with(node, ops=[SWAPS[type(node.ops[0])](), *node.ops[1:]])
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield ast.Constant(node.value + 1)
    elif isinstance(node, ast.Call):
        if len(node.args) == 1 or (node.args and not node.keywords):
            yield node.args[0]  # the call is left out, its argument stays
        if isinstance(node.func, ast.Attribute):
            yield node.func.value
        if len(node.args) > 1 and getattr(node.func, "id", "") not in ("min", "max"):
            yield _with(node, args=[node.args[1], node.args[0], *node.args[2:]])
        for i in [i for i, keyword in enumerate(node.keywords) if keyword.arg != "strict"]:
            yield _with(node, keywords=[*node.keywords[:i], *node.keywords[i + 1 :]])
    elif isinstance(node, ast.Slice):
        for bound in ("lower", "upper", "step"):
            if getattr(node, bound) is not None:
                yield _with(node, **{bound: None})
    elif isinstance(node, ast.IfExp):
        yield _with(node, body=node.orelse, orelse=node.body)
    if isinstance(node, ast.Assign | ast.AugAssign | ast.If | ast.For) or (
        isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)
    ):
        yield None


def _with(node: ast.AST, **fields: object) -> ast.AST:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def mutants(source: str) -> Iterator[tuple[str, str]]:
    """Each change to an answer, in words, and the answer that has it."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        for field, value in ast.iter_fields(node):
            if field in ("decorator_list", "annotation", "returns", "func") or isinstance(node, ast.JoinedStr):
                continue
            if isinstance(node, ast.keyword) and node.arg == "strict":  # for readers: lengths are equal
                continue
            for place, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if not isinstance(child, ast.AST):
                    continue
                for new in changes(child):
                    old = ast.unparse(child).splitlines()[0]
                    said = f"{old} -> {ast.unparse(new).splitlines()[0] if new else '(nothing)'}"
                    if place is None:
                        setattr(node, field, new)
                    else:
                        value[place : place + 1] = [new or ast.Pass()]
                    yield said, ast.unparse(ast.fix_missing_locations(copy.deepcopy(tree)))
                    if place is None:
                        setattr(node, field, child)
                    else:
                        value[place] = child


def survivors(name: str, sample: int | None, seed: int = 0) -> tuple[int, list[tuple[str, str, str]]]:
    """How many mistakes were planted in the solutions of a notebook, and those that passed: task, change, answer."""
    from test_grading import course_of

    from minipar.course.grade import grade

    notebook = nbformat.read(ROOT / "solutions" / f"{name}.ipynb", as_version=4)
    planted: list[tuple[str, str, str]] = []
    for cell in notebook.cells:
        if task := cell.metadata.get("task"):
            every = list(dict(mutants(cell.source)).items())
            draw = random.Random(f"{seed} {task}")
            some = every if sample is None else draw.sample(every, min(sample, len(every)))
            planted += [(task, change, answer) for change, answer in some]
    with tempfile.TemporaryDirectory() as folder:
        attempts = [(task, answer) for task, _, answer in planted]
        learner = course_of(Path(folder), name, attempts, seconds=SECONDS)
        verdicts = grade(learner)
    passed = [one for one, verdict in zip(planted, verdicts, strict=True) if verdict.outcome == "pass"]
    return len(planted), [one for one in passed if one[:2] not in SURVIVORS]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="notebooks, by how their names begin; all without")
    parser.add_argument("--sample", type=int, help="so many of each task, in place of all")
    options = parser.parse_args()
    whole, left = 0, 0
    for path in sorted((ROOT / "solutions").glob("*.ipynb")):
        if options.names and not path.stem.startswith(tuple(options.names)):
            continue
        planted, passed = survivors(path.stem, options.sample)
        print(f"{path.stem}: {planted - len(passed)} of {planted} are noticed", flush=True)
        for task, change, _ in passed:
            print(f"  {task}  {change}")
        whole, left = whole + planted, left + len(passed)
    print(f"{1 - left / max(whole, 1):.1%} of {whole}, not counting {len(SURVIVORS)} that may pass")
    return left > 0


if __name__ == "__main__":
    sys.exit(main())
