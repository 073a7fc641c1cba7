"""The torch graph as an OpenVINO model, and as files beside the tensors that the run keeps anyway."""

import hashlib
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msvae.core.errors import EngineError, RunError
from msvae.core.replacement import temporary_folder

XML, BIN = "graph.xml", "graph.bin"
RUN = ["msvae", "made_of"]  # where the model says which arrays it goes with
SHARED_BYTES = 4096  # a constant of at least so many is not written twice
CLOSE = (
    1e-3  # how far the converted graph may be from torch, in deviations of a number or shares of it
)


def convert(graph: Any, example: NDArray[np.uint8]) -> Any:
    """The OpenVINO model of a torch graph of pixels (B, S, S, 3) uint8, B open, in float32.

    Raises `EngineError` where its numbers for the `example`, normal images, are not torch's.
    """
    import openvino
    import torch

    pixels = torch.from_numpy(np.array(example))
    device = next(graph.parameters()).device
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # sides are numbers in what is traced; torch.jit is deprecated
        expected = graph(pixels.to(device))[0].cpu().numpy()
        traced = torch.jit.trace(graph, pixels.to(device), check_trace=False)
        model = _converted(traced, pixels)
    tried = model.clone()
    tried.reshape(list(pixels.shape))
    compiled = openvino.compile_model(tried, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    numbers = compiled(pixels.numpy())[0]
    if not np.allclose(numbers, expected, rtol=CLOSE, atol=CLOSE):
        raise EngineError(
            f"OpenVINO {openvino.__version__} computes other numbers than torch: "
            "use --engine reference, and please report it"
        )
    model.reshape([-1, *pixels.shape[1:]])
    return model


def _converted(traced: Any, pixels: Any) -> Any:
    """The traced graph by OpenVINO's frontend; `convert_model` takes twice the time."""
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    frontend = FrontEndManager().load_by_framework("pytorch")
    decoder = TorchScriptPythonDecoder(traced, example_input=(pixels,))
    return frontend.convert(frontend.load(decoder))


def dump(model: Any, arrays: Mapping[str, NDArray[Any]]) -> dict[str, bytes]:
    """The model's two files; of the constants that are among `arrays` only the names are kept."""
    import openvino
    from openvino import op

    names = {_digest(array): name for name, array in arrays.items() if _is_large(array)}
    copy = model.clone()
    for node in copy.get_ops():
        if node.get_type_name() == "Constant":
            data = node.data
            name = names.get(_digest(data)) if _is_large(data) else None
            if name is not None:
                stand_in = op.Parameter(node.get_element_type(), node.get_output_partial_shape(0))
                stand_in.set_friendly_name(name)
                for reader in node.output(0).get_target_inputs():
                    reader.replace_source_output(stand_in.output(0))
                copy.add_parameters([stand_in])
    copy.set_rt_info(_digest_of_all(arrays), RUN)
    with temporary_folder() as folder:
        openvino.serialize(copy, folder / XML, folder / BIN)
        return {name: (folder / name).read_bytes() for name in (XML, BIN)}


def restore(files: Mapping[str, bytes], arrays: Mapping[str, NDArray[Any]], where: str) -> Any:
    """The model of `dump`ed files and the arrays of their run; `RunError` where they disagree."""
    import openvino
    from openvino import op

    try:
        model = openvino.Core().read_model(files[XML], files[BIN])
        made_of = model.get_rt_info(RUN).astype(str)
    except RuntimeError as error:
        raise RunError(f"{where}: is not a graph that OpenVINO reads: fit it again") from error
    if made_of != _digest_of_all(arrays):
        raise RunError(f"{where}: does not match its run: fit it again")
    for parameter in model.get_parameters()[1:]:
        name, shape = parameter.get_friendly_name(), tuple(parameter.get_output_shape(0))
        array = arrays.get(name)
        if array is None or array.shape != shape:
            raise RunError(f"{where}: does not match its run (tensor {name}): fit it again")
        constant = op.Constant(np.ascontiguousarray(array))
        constant.set_friendly_name(name)
        for reader in parameter.output(0).get_target_inputs():
            reader.replace_source_output(constant.output(0))
        model.remove_parameter(parameter)
    model.validate_nodes_and_infer_types()
    return model


def _is_large(array: NDArray[Any]) -> bool:
    return array.nbytes >= SHARED_BYTES


def _digest(array: NDArray[Any]) -> str:
    head = f"{array.dtype} {array.shape} ".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()


def _digest_of_all(arrays: Mapping[str, NDArray[Any]]) -> str:
    whole = [f"{name} {_digest(array)}" for name, array in sorted(arrays.items())]
    return hashlib.sha256("\n".join(whole).encode()).hexdigest()
