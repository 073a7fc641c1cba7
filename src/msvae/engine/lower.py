"""A graph in bfloat16: its convolutions lowered from outside; what becomes a number stays in float32."""

from typing import Any

LAYERS = ("Convolution", "ConvolutionBackpropData")
COLOURS = 3


def lower(model: Any) -> Any:
    """Compute the convolutions of wide maps in bfloat16, each with its bias and SiLU, in place.

    Those that read the image stay in float32, as 8 bits of a pixel are more than bfloat16 holds; so
    do statistics, distances, latents and what is drawn: many of them are differences of nearly equal
    numbers. Returns the OpenVINO model.
    """
    from openvino._offline_transformations import apply_moc_transformations

    apply_moc_transformations(model, cf=False)  # batch norms become part of their convolutions
    for node in model.get_ordered_ops():
        if node.get_type_name() in LAYERS:
            layer = [node, *_followers(node)]
            channels = node.input_value(0).get_partial_shape()[1].get_length()
            if layer[-1].get_type_name() == "Swish" and channels > COLOURS:
                _lower_layer(layer)
    model.validate_nodes_and_infer_types()
    return model


def _followers(node: Any) -> list[Any]:
    """The bias and the SiLU that alone read a convolution, where it has any."""
    found = list[Any]()
    for kind in ("Add", "Swish"):
        readers = list((found or [node])[-1].output(0).get_target_inputs())
        if len(readers) == 1 and readers[0].get_node().get_type_name() == kind:
            found.append(readers[0].get_node())
    return found


def _lower_layer(layer: list[Any]) -> None:
    from openvino import opset13

    readers = list(layer[-1].output(0).get_target_inputs())
    inside = {node.get_friendly_name() for node in layer}
    for node in layer:
        for i in range(len(node.inputs())):
            source = node.input_value(i)
            # A transposed convolution's third input is a shape; what the layer makes is lowered already.
            if i < 2 and source.get_node().get_friendly_name() not in inside:
                node.input(i).replace_source_output(_lowered(source))
        node.constructor_validate_and_infer_types()
    restored = opset13.convert(layer[-1].output(0), "f32")
    for reader in readers:
        reader.replace_source_output(restored.output(0))


def _lowered(source: Any) -> Any:
    """An output in bfloat16: what it was restored from, where it was."""
    from openvino import Type, opset13

    above = source.get_node()
    if above.get_type_name() == "Convert" and above.input_value(0).get_element_type() == Type.bf16:
        return above.input_value(0)
    return opset13.convert(source, "bf16").output(0)
