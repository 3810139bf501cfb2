"""Write a model as ONNX, as a program of ``torch.export``, for OpenVINO, or its weights as safetensors."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from recsys_ssm import __version__
from recsys_ssm.errors import UserError
from recsys_ssm.exporting.graphs import Graph, graphs_of
from recsys_ssm.instantiate import find, plain
from recsys_ssm.models.next_item import NextItem
from recsys_ssm.models.recommender import Recommender
from recsys_ssm.models.two_tower import TwoTower
from recsys_ssm.ops._dispatch import exporting
from recsys_ssm.run.files import write_bytes

FORMATS = ("onnx", "torch_export", "openvino", "safetensors")

METADATA = "recsys_ssm"
"""Key of the JSON with ids, vocabularies and scaling in a file's metadata."""
OPSET = 20


def traced(graph: Graph) -> torch.export.ExportedProgram:
    """Trace a graph to standard operators of PyTorch, for any batch size and length.

    Raises:
        UserError: An operator of the model cannot be traced.
    """
    shapes: Any = {
        name: dict.fromkeys(graph.axes.get(name, {}), torch.export.Dim.AUTO) or None
        for name in graph.inputs
    }
    values = tuple(graph.inputs.values())
    positional = type(graph).forward.__code__.co_flags & 0x04  # *inputs
    dynamic = (tuple(shapes.values()),) if positional else shapes
    try:
        with _quiet(), exporting(), torch.no_grad():
            return torch.export.export(graph, values, dynamic_shapes=dynamic, strict=False)
    except Exception as error:  # whatever a user's own module causes
        raise _cannot(graph, "torch_export", error) from error


def check(graph: Graph, form: str, run: Callable[[dict[str, torch.Tensor]], Sequence[Any]]) -> None:
    """Check that an exported graph returns what the model does, for small and large batches and lengths.

    Args:
        graph: The graph that was exported.
        form: The format, for the message.
        run: Runs the exported one on inputs by name.

    Raises:
        UserError: It fails, or returns something else: a size was taken as fixed, for example.
    """
    for batch, length in ((1, 1), (1, 2), (2, 9), (5, graph.longest + 7)):
        inputs = graph.sample(batch, length)
        with torch.no_grad():
            expected = graph(*inputs.values())
        expected = expected if isinstance(expected, tuple) else (expected,)
        where = f"{batch} rows of {length}"
        try:
            found = run(inputs)
        except Exception as error:  # the runtime's own
            raise _cannot(graph, form, error, where) from error
        for name, one, other in zip(graph.outputs, expected, found, strict=True):
            other = torch.as_tensor(other)
            near = name == "items" or torch.allclose(
                one, other, rtol=1e-3, atol=1e-4, equal_nan=True
            )
            if one.shape != other.shape or not near:
                reason = f"output {name} differs from the model's"
                raise _cannot(graph, form, ValueError(reason), where)


def onnx_bytes(graph: Graph, metadata: Mapping[str, str]) -> bytes:
    """Return a graph as an ONNX file of standard operators.

    Raises:
        UserError: The packages are absent, or ONNX has no such operator.
    """
    needs("onnx", "onnx", "onnxscript", "onnxruntime")
    program = traced(graph)
    try:
        with _quiet(), torch.no_grad():
            converted = torch.onnx.export(
                program,
                input_names=list(graph.inputs),
                output_names=list(graph.outputs),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
                custom_translation_table=_translations(),
            )
    except Exception as error:  # the exporter's own, of many kinds
        raise _cannot(graph, "onnx", error) from error
    assert converted is not None
    converted.model.metadata_props.update(metadata)
    try:
        content = converted.model_proto.SerializeToString()
    except ValueError as error:
        raise UserError(
            f"the model is larger than the 2 GB that one ONNX file can hold ({error}); give format=torch_export"
        ) from error
    import onnxruntime

    quiet = onnxruntime.SessionOptions()
    quiet.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, quiet, providers=["CPUExecutionProvider"])
    check(graph, "onnx", lambda given: session.run(None, {k: v.numpy() for k, v in given.items()}))
    return content


def torch_export_bytes(graph: Graph, metadata: Mapping[str, str]) -> bytes:
    """Return a graph as a file of ``torch.export.load``, with the metadata as extra files."""
    buffer, program = io.BytesIO(), traced(graph)
    module = program.module()
    with torch.no_grad():
        check(graph, "torch_export", lambda given: _tuple(module(*given.values())))
    with _quiet():
        torch.export.save(program, buffer, extra_files=dict(metadata))
    return buffer.getvalue()


def _tuple(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


def needs(form: str, *packages: str) -> None:
    """Check that the packages of a format are installed.

    Raises:
        UserError: One is not.
    """
    for package in packages:
        try:
            __import__(package)
        except ImportError as error:
            raise UserError(
                f"format={form} needs the package {package}; pip install 'recsys-ssm[export]'"
            ) from error


def _cannot(graph: Graph, form: str, error: Exception, where: str = "") -> UserError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reasons = [line for line in lines if line.startswith(("<class", "No ONNX", "No decompos"))]
    reason = (reasons or lines or [type(error).__name__])[0][:200]
    return UserError(
        f"format={form}: an operator of {graph.title} cannot be exported ({reason}{where and f', {where}'}); use "
        "standard operators that know any size in the module, or give format=safetensors"
    )


def _translations() -> dict[Any, Callable[..., Any]]:
    """Return ONNX forms of operators that the exporter has none for."""
    from onnxscript import opset20

    op: Any = opset20

    def running(reduce: Callable[..., Any], farthest: int) -> Callable[..., Any]:
        def translate(self: Any, dim: int) -> Any:
            """Reduce all earlier places at each place, for the last axis of integers."""
            length = op.Shape(self, start=-1)
            seen = op.Trilu(
                op.Expand(op.Constant(value_int=1), op.Concat(length, length, axis=0)), upper=0
            )
            spread = op.Unsqueeze(self, op.Constant(value_ints=[-2]))
            far = op.Constant(value_int=farthest)
            values = reduce(
                op.Where(op.Cast(seen, to=9), spread, far), op.Constant(value_ints=[-1]), keepdims=0
            )
            return values, values

        return translate

    return {
        torch.ops.aten.cummax.default: running(op.ReduceMax, -(2**62)),
        torch.ops.aten.cummin.default: running(op.ReduceMin, 2**62),
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out the exporters' messages about other packages."""
    loggers = [
        logging.getLogger(name) for name in ("torch.onnx", "torch.fx", "onnx_ir", "onnxscript")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def metadata_of(model: Recommender, filter_seen: bool | None) -> dict[str, Any]:
    """Return what a file has to say beside its graph: ids in catalogue order, vocabularies, scaling, options."""
    common = {
        "format": 1,
        "recsys_ssm": __version__,
        "model": type(model).__name__,
        "item_ids": model.item_ids,
    }
    if isinstance(model, NextItem):
        seen = model.filter_seen if filter_seen is None else filter_seen
        return {**common, "max_length": model.max_length, "filter_seen": seen}
    if isinstance(model, TwoTower):
        return {
            **common,
            "users": model.user_schema.to_dict(),
            "items": model.item_schema.to_dict(),
        }
    return common


def export_model(
    model: Recommender, folder: Path | str, form: str, *, filter_seen: bool | None = None
) -> list[Path]:
    """Write a model in a format that other programs read; ids, vocabularies and scaling are in the files.

    Args:
        model: A trained model.
        folder: Folder to write ``model.*`` to, or ``users.*`` and ``items.*`` for two towers.
        form: ``onnx``, ``torch_export``, ``openvino`` or ``safetensors``, the last of weights alone.
        filter_seen: Leave out the items of a history. None: as in the test.

    Returns:
        The files.

    Raises:
        UserError: The format is unknown, its packages are absent, or an operator of the model cannot be exported.
    """
    if form not in FORMATS:
        raise UserError(f"format={form}: expected one of {', '.join(FORMATS)}")
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"output={folder}: cannot make this folder ({error.strerror}); give another one"
        ) from error
    if form == "safetensors":
        return [_write_safetensors(model, folder / "model.safetensors")]
    metadata = {METADATA: json.dumps(metadata_of(model, filter_seen))}
    written: list[Path] = []
    for name, graph in graphs_of(model, filter_seen).items():
        if form == "onnx":
            written.append(write_bytes(folder / f"{name}.onnx", onnx_bytes(graph, metadata)))
        elif form == "torch_export":
            written.append(write_bytes(folder / f"{name}.pt2", torch_export_bytes(graph, metadata)))
        else:
            written += _write_openvino(graph, metadata, folder, name)
    return written


def _write_openvino(
    graph: Graph, metadata: Mapping[str, str], folder: Path, name: str
) -> list[Path]:
    needs("openvino", "openvino")
    import openvino

    try:
        model = openvino.Core().read_model(model=onnx_bytes(graph, {}))
    except RuntimeError as error:
        raise _cannot(graph, "openvino", error) from error
    for key, value in metadata.items():
        model.set_rt_info(value, [key])
    with tempfile.TemporaryDirectory(dir=folder) as beside:
        openvino.save_model(model, Path(beside, f"{name}.xml"), compress_to_fp16=False)
        # The weights first: a description without them is of no use.
        return [
            Path(beside, f"{name}{end}").replace(folder / f"{name}{end}")
            for end in (".bin", ".xml")
        ]


def _write_safetensors(model: Recommender, path: Path) -> Path:
    needs("safetensors", "safetensors")
    from safetensors.torch import save

    target = f"{type(model).__module__}.{type(model).__qualname__}"
    options = plain(dict(model.hparams))
    weights = {name: x.detach().cpu().contiguous() for name, x in model.state_dict().items()}
    metadata = {METADATA: json.dumps({"_target_": target, **options})}
    return write_bytes(path, save(weights, metadata))


def load_safetensors(path: Path | str) -> Recommender:
    """Return the model of a file of ``format=safetensors``, in evaluation mode. Nothing in it is executed.

    Raises:
        UserError: There is no such file, it is damaged, or it names a class that is not trusted.
    """
    needs("safetensors", "safetensors")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            options = json.loads((file.metadata() or {})[METADATA])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        target = options.pop("_target_")
    except (OSError, SafetensorError, KeyError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: not a file of format=safetensors ({str(error)[:100]}); give one that export wrote"
        ) from error
    model_class = find(target, "model", Recommender)
    if not issubclass(model_class, Recommender):
        raise UserError(f"{path}: {target} is not a Recommender; give a file that export wrote")
    try:
        model: Recommender = model_class(**options)
        model.load_state_dict(weights)
    except UserError:
        raise
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(
            f"{path}: does not fit its options ({str(error).splitlines()[0][:100]}); export the run again"
        ) from error
    return model.eval()
