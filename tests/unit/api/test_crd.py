"""The generated CRD is a structural schema that says what the types say."""

from typing import Any

import pytest
from pydantic import BaseModel

from qlora_api.crd import crd, schema_of
from qlora_api.types import QLoRAFinetuneSpec

ALLOWED = {
    "additionalProperties", "default", "description", "enum", "exclusiveMaximum", "exclusiveMinimum", "format", "items",
    "maxItems", "maxLength", "maxProperties", "maximum",
    "minItems", "minLength", "minimum", "pattern", "properties", "required", "type",
    "x-kubernetes-int-or-string", "x-kubernetes-preserve-unknown-fields", "x-kubernetes-validations",
}  # fmt: skip


def nodes(schema: dict[str, Any]) -> list[dict[str, Any]]:
    children = [*schema.get("properties", {}).values()]
    children += [schema[key] for key in ("items", "additionalProperties") if isinstance(schema.get(key), dict)]
    return [schema, *(node for child in children for node in nodes(child))]


def root() -> dict[str, Any]:
    return crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


def test_every_node_is_structural() -> None:
    for node in nodes(root()):
        assert set(node) <= ALLOWED
        assert "type" in node or node.get("x-kubernetes-int-or-string"), node


def test_every_field_is_described() -> None:
    for part in ("spec", "status"):
        for node in nodes(root()["properties"][part]):
            for name, child in node.get("properties", {}).items():
                assert child.get("description"), f"{part}: {name} has no description"


def test_every_default_of_the_spec_is_told() -> None:
    for node in nodes(root()["properties"]["spec"]):
        for name, child in node.get("properties", {}).items():
            if "properties" not in child and child.get("default") not in (None, {}, []):
                assert " Default: " in child["description"], name
    spec = root()["properties"]["spec"]["properties"]
    assert spec["training"]["properties"]["learningRate"]["description"] == "Peak learning rate. Default: 0.0002."
    assert spec["suspend"]["description"].endswith(" Default: false.")
    assert spec["lora"]["properties"]["targetModules"]["description"].endswith(" Default: all-linear.")
    assert spec["resourcesPerNode"]["properties"]["limits"]["description"].endswith(" Default: nvidia.com/gpu: 1.")
    assert not spec["image"]["description"].count("Default:")


def test_every_number_of_the_spec_is_bounded() -> None:
    for node in nodes(root()["properties"]["spec"]):
        for name, child in node.get("properties", {}).items():
            if child.get("type") in ("integer", "number"):
                told = [
                    rule for rule in child.get("x-kubernetes-validations", []) if rule["rule"].startswith("self >= ")
                ]
                assert "minimum" in child or told, f"{name} has no lower bound"


def test_what_defines_the_result_cannot_change() -> None:
    spec = root()["properties"]["spec"]["properties"]
    for field in ("model", "dataset", "quantization", "lora", "training", "output"):
        assert any(rule["rule"] == "self == oldSelf" for rule in spec[field]["x-kubernetes-validations"])
    for field in ("suspend", "elasticPolicy", "podTemplate", "failurePolicy"):
        assert all(rule["rule"] != "self == oldSelf" for rule in spec[field].get("x-kubernetes-validations", []))


def test_a_union_is_refused() -> None:
    class Union(BaseModel):
        value: int | str

    with pytest.raises(TypeError, match="union"):
        schema_of(Union)


def test_the_defaults_round_trip() -> None:
    given = {"model": {"uri": "hf://a/b"}, "dataset": {"uri": "s3://d/x.jsonl"}, "output": {"uri": "s3://bucket/out"}}
    spec = QLoRAFinetuneSpec.model_validate(given)
    assert QLoRAFinetuneSpec.model_validate(spec.to_wire()) == spec
    assert spec.lora.r == 16 and spec.quantization.type == "nf4"
