"""Work out how a pair of models is best run on given GPUs: memory, speed, flags.

Nothing is started or measured: this is the cost model of `runtime/costmodel`, and the output says what it assumes.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

from paceline.actors.commands.plan_answer import Question, as_json, show
from paceline.runtime.config import EngineConfig
from paceline.runtime.costmodel import gpus, memory
from paceline.runtime.costmodel.acceptance import KEPT
from paceline.runtime.costmodel.passes import EAGER, GRAPHS, Machine
from paceline.runtime.costmodel.plan import NEEDS, Wish, make_plan
from paceline.runtime.costmodel.rounds import Setting
from paceline.runtime.costmodel.shapes import SHAPES, Shape, known_shape
from paceline.runtime.errors import ConfigError, ModelError

NAME = "plan"
EXECUTIONS = {execution.name: execution for execution in (EAGER, GRAPHS)}
ENGINE = EngineConfig()
"""Its defaults are those of a plan."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    known = f"A folder, a hub id, or one of {', '.join(SHAPES)}."
    parser.add_argument("--model", required=True, metavar="M", help=f"The target. {known}")
    parser.add_argument("--speculative-model", metavar="D", help="The drafter, likewise.")
    parser.add_argument("--gpu", required=True, help=", ".join(gpu.name for gpu in gpus.GPUS) + ".")
    count = _positive(int)
    parser.add_argument(
        "--gpus", type=count, default=1, metavar="N", help="All there are (default: 1)."
    )
    parser.add_argument(
        "--nodes", type=count, default=1, metavar="N", help="They stand on (default: 1)."
    )
    parser.add_argument(
        "--network",
        type=_positive(float),
        default=50.0,
        metavar="GB/S",
        help="Between nodes, of each GPU, one direction (default: 50, an adapter of 400 Gb/s each).",
    )
    parser.add_argument(
        "--context",
        type=count,
        default=4096,
        metavar="N",
        help="Tokens of a sequence at its longest (default: 4096).",
    )
    parser.add_argument(
        "--prompt-len",
        type=count,
        metavar="N",
        help="Of these, the prompt's (default: three quarters).",
    )
    parser.add_argument(
        "--batch",
        type=count,
        default=1,
        metavar="N",
        help="Sequences written side by side on each engine (default: 1).",
    )
    parser.add_argument(
        "--acceptance",
        type=_number(float, above=0.0, most=1.0),
        default=0.75,
        metavar="X",
        help="Chance that a draft is kept if those before it were (default: 0.75).",
    )
    parser.add_argument(
        "--execution",
        choices=sorted(EXECUTIONS),
        default=EAGER.name,
        help="Kernels are launched one by one, as Paceline does today, or captured as CUDA graphs "
        "(default: eager).",
    )
    fixed = parser.add_argument_group("fixed rather than chosen")
    fixed.add_argument(
        "--tensor-parallel-size",
        type=count,
        metavar="N",
        help="Of the target; the GPUs of a node if not given, all if it needs them.",
    )
    fixed.add_argument(
        "--draft-tensor-parallel-size", type=count, metavar="N", help="Ranks of the drafter."
    )
    fixed.add_argument(
        "--layer-parallel-size",
        type=int,
        choices=sorted(KEPT),
        help="Layers of the drafter side by side.",
    )
    fixed.add_argument(
        "--num-speculative-tokens", type=count, metavar="N", help="Drafts of a round."
    )
    fixed.add_argument(
        "--placement",
        choices=("tensor", "layer"),
        help="Split every layer, or give ranks whole ones.",
    )
    fixed.add_argument(
        "--schedule",
        choices=tuple(NEEDS),
        help="Draft, then verify; both for halves of the batch in turn; or on ranks apart.",
    )
    fixed.add_argument(
        "--gpu-memory-utilization",
        type=_number(float, above=0.0, most=1.0),
        default=ENGINE.gpu_memory_utilization,
        metavar="X",
        help=f"(default: {ENGINE.gpu_memory_utilization}).",
    )
    parser.add_argument("--json", action="store_true", help="For programs: seconds, bytes, tokens.")


def run(args: argparse.Namespace) -> int:
    question = _question(args)
    plan = make_plan(
        question.setting,
        question.wish,
        prompt=question.prompt,
        output=question.output,
        chunk=ENGINE.max_num_batched_tokens,
        num_engines=question.num_engines,
    )
    if args.json:
        print(json.dumps(as_json(question, plan), indent=1))
    else:
        show(question, plan)
    return 0


# What is asked


def _question(args: argparse.Namespace) -> Question:
    """Raises UserError for what is unknown or contradicts itself."""
    if args.gpus % args.nodes:
        raise ConfigError(f"--gpus {args.gpus} do not divide over --nodes {args.nodes}")
    machine = Machine(
        gpu=gpus.find_gpu(args.gpu),
        execution=EXECUTIONS[args.execution],
        gpus_per_node=args.gpus // args.nodes,
        network=args.network * 1e9,
    )
    target = find_shape(args.model, context=args.context)
    ranks = args.tensor_parallel_size or _ranks(target, machine, args)
    if ranks > args.gpus:
        raise ConfigError(f"--tensor-parallel-size {ranks} is more than --gpus {args.gpus}")
    draft_ranks = args.draft_tensor_parallel_size
    if draft_ranks is not None and draft_ranks > ranks:
        raise ConfigError(
            f"--draft-tensor-parallel-size {draft_ranks} is more than the target's {ranks}"
        )
    prompt = args.prompt_len or max(1, args.context * 3 // 4)
    if prompt >= args.context:
        raise ConfigError(
            f"--prompt-len {prompt} leaves nothing to write in --context {args.context}"
        )
    drafter = (
        None
        if args.speculative_model is None
        else find_shape(args.speculative_model, context=args.context)
    )
    return Question(
        setting=Setting(
            target=target,
            drafter=drafter,
            machine=machine,
            ranks=ranks,
            batch=args.batch,
            context=args.context,
            acceptance=args.acceptance,
            utilization=args.gpu_memory_utilization,
        ),
        wish=Wish(
            num_speculative_tokens=args.num_speculative_tokens,
            layer_parallel_size=args.layer_parallel_size,
            draft_tensor_parallel_size=draft_ranks,
            placement=args.placement,
            schedule=args.schedule,
        ),
        num_engines=args.gpus // ranks,
        num_gpus=args.gpus,
        num_nodes=args.nodes,
        prompt=prompt,
        output=args.context - prompt,
        model=args.model,
        speculative_model=args.speculative_model,
    )


def find_shape(model: str, *, context: int) -> Shape:
    """Of a public model by name, or from the config.json of a folder or hub id. Raises ModelError for one that is not
    to be had, ConfigError where its own limit is below `context`."""
    known = known_shape(model)
    if known is not None and not Path(model).is_dir():
        return known
    from paceline.runtime.models.arch import context_length, read_architecture

    try:
        arch = read_architecture(_folder(model))
    except ModelError as error:
        raise ModelError(f"{error}; known by name: {', '.join(SHAPES)}") from None
    context_length(context, arch)
    return Shape(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        num_heads=arch.num_heads,
        num_kv_heads=arch.num_kv_heads,
        head_dim=arch.head_dim,
        ff_size=arch.ff_size,
        vocab_size=arch.vocab_size,
        tied_embeddings=arch.tied_embeddings,
        itemsize=4 if arch.dtype == "float32" else 2,
    )


def _folder(model: str) -> Path:
    """Of a hub id no more than the config.json is fetched: a plan needs no weights."""
    from paceline.runtime.models.weights import find_model

    if (
        model.count("/") != 1
        or model.startswith((".", "/", "~", "embedded"))
        or Path(model).exists()
    ):
        return find_model(model)
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model, "config.json")).parent
    except Exception as error:  # whatever the hub or the network says, the user needs one line
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(
            f"{model} is neither a folder nor to be had from the hub: {reason}"
        ) from None


def _ranks(target: Shape, machine: Machine, args: argparse.Namespace) -> int:
    """The GPUs of a node, or all where the model does not fit those."""
    part = memory.held(target, ranks=machine.gpus_per_node)
    room = memory.rank_memory(
        part, None, gpu_bytes=machine.gpu.memory_bytes, utilization=args.gpu_memory_utilization
    )
    fits = room.kv_tokens >= args.batch * args.context
    return machine.gpus_per_node if fits else int(args.gpus)


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    """A parser of numbers above 0."""
    return _number(kind, above=0.0, most=math.inf)


def _number(kind: type[int] | type[float], *, above: float, most: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        bound = f"a number above {above:g}" + (f" and at most {most:g}" if most < math.inf else "")
        try:
            value = kind(text)
        except ValueError:
            value = kind(0)
        if not above < value <= most or math.isinf(value):
            raise argparse.ArgumentTypeError(f"expected {bound}, found {text!r}")
        return value

    return parse
