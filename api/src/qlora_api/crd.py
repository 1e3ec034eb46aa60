"""The CustomResourceDefinition, made from types.py and status.py (`make manifests` writes it).

pydantic's JSON Schema is rewritten into a Kubernetes structural schema: references are inlined, optional unions
collapse, exclusive bounds become OpenAPI 3.0 flags, a pattern or a lower bound with a sentence becomes a CEL rule that
answers with the sentence (a bare pattern would answer with the regular expression), and what a structural schema cannot
say raises TypeError.
"""

from typing import Any

from pydantic import BaseModel

from qlora_api import names
from qlora_api.base import cel
from qlora_api.status import QLoRAFinetuneStatus
from qlora_api.types import QLoRAFinetuneSpec

Node = dict[str, Any]
_FORBIDDEN = ("oneOf", "allOf", "prefixItems")


def structural(node: Node, definitions: Node) -> Node:
    """One node of JSON Schema as a structural schema node."""
    node = _collapse(node, definitions)
    if bad := [key for key in _FORBIDDEN if key in node]:
        raise TypeError(f"{bad} is not allowed in a structural schema: {node}")
    out: Node = {}
    for key, value in node.items():
        if key in ("title", "additionalProperties") and not isinstance(value, dict):
            continue
        if key == "default" and value is None:
            continue
        if key == "default" and isinstance(value, dict):  # the API server refuses null, also inside a default
            value = {name: child for name, child in value.items() if child is not None}
        if key in ("pattern", "minimum") and "x-sentence" in node:
            continue
        if key == "maximum" and value != int(value):  # the API server would call a bound of 0.9 "0"
            out.setdefault("x-kubernetes-validations", []).append(cel(f"self <= {value}", f"write at most {value}"))
        elif key == "x-sentence":
            rule = f"self.matches({node['pattern']!r})" if "pattern" in node else f"self >= {node['minimum']}"
            out.setdefault("x-kubernetes-validations", []).append(cel(rule, value))
        elif key == "properties":
            out[key] = {name: structural(child, definitions) for name, child in value.items()}
        elif key in ("items", "additionalProperties"):
            out[key] = structural(value, definitions)
        elif key in ("exclusiveMinimum", "exclusiveMaximum"):
            out[key.replace("exclusiveM", "m")], out[key] = value, True
        elif key == "const":
            out["enum"] = [value]
        else:
            out[key] = value
    if out.get("type") == "integer":
        out["format"] = "int64"
    return out


def _collapse(node: Node, definitions: Node) -> Node:
    """Inline a reference; reduce `X | None` to X and `int | str` with its Kubernetes mark to that mark."""
    if "$ref" in node:
        target = definitions[node["$ref"].rsplit("/", 1)[1]]
        own = {key: value for key, value in node.items() if key != "$ref"}
        marks = [*target.get("x-kubernetes-validations", []), *own.get("x-kubernetes-validations", [])]
        node = {**_collapse(target, definitions), **own, **({"x-kubernetes-validations": marks} if marks else {})}
    if node.get("x-kubernetes-int-or-string"):
        return {key: value for key, value in node.items() if key != "anyOf"}
    if "anyOf" in node:
        options = [option for option in node["anyOf"] if option.get("type") != "null"]
        if len(options) != 1:
            raise TypeError(f"a union has no structural schema: {node}")
        node = {**_collapse(options[0], definitions), **{key: value for key, value in node.items() if key != "anyOf"}}
    if node.get("x-kubernetes-preserve-unknown-fields"):
        node = {key: value for key, value in node.items() if key != "additionalProperties"}
    return node


def tell_defaults(node: Node) -> Node:
    """The schema with every field's default in its description, where `kubectl explain` shows it."""
    out = dict(node)
    if "properties" in node:
        out["properties"] = {name: tell_defaults(child) for name, child in node["properties"].items()}
    elif told := _in_words(node.get("default")):
        out["description"] = f"{node['description']} Default: {told}."
    return out


def _in_words(default: Any) -> str:
    """A default as a person would write it in YAML; nothing for one that is empty."""
    match default:
        case None:
            return ""
        case bool():
            return str(default).lower()
        case float():
            return f"{default:g}"
        case dict():
            return ", ".join(f"{name}: {_in_words(value)}" for name, value in default.items())
        case list():
            return ", ".join(map(_in_words, default))
    return str(default)


def schema_of(model: type[BaseModel]) -> Node:
    """Structural schema of a model."""
    schema = model.model_json_schema(by_alias=True)
    return structural({key: value for key, value in schema.items() if key != "$defs"}, schema.get("$defs", {}))


def _column(name: str, path: str, kind: str = "string", priority: int = 0, description: str = "") -> Node:
    column = {"name": name, "type": kind, "jsonPath": path, "description": description}
    return {**column, "priority": priority} if priority else column


COLUMNS = [
    _column("State", ".status.state", description="Pending, Starting, Running, Waiting, Suspended, Succeeded, Failed"),
    _column("Reason", '.status.conditions[?(@.type=="Running")].reason', description="Why it is in that state"),
    _column("Step", ".status.progress.step", "integer", description="Optimizer steps done"),
    _column("Of", ".status.progress.totalSteps", "integer", description="Optimizer steps in all"),
    _column("Loss", ".status.progress.loss", "number", description="Training loss of the last step"),
    _column("Eval", ".status.progress.evalLoss", "number", description="Newest evaluation loss"),
    _column("Tok/s", ".status.progress.tokensPerSecond", "number", description="Tokens a second over all nodes"),
    _column("ETA", ".status.progress.etaSeconds", "integer", description="Seconds to go"),
    _column("Nodes", ".status.nodesSummary", description="Members / wanted"),
    _column("Age", ".metadata.creationTimestamp", "date"),
    _column("Disruptions", ".status.restarts.disruptions", "integer", 1, "Members lost without fault of the run"),
    _column("Failures", ".status.restarts.failures", "integer", 1, "Failures that count"),
    _column("Adapter", ".status.artifacts.adapterUri", priority=1, description="Where the adapter is"),
]


def crd() -> Node:
    """The CustomResourceDefinition."""
    too_long = f"metadata.name must have at most {names.MAX_NAME} characters, so that the pods' names fit a label"
    schema = {
        "type": "object",
        "description": "A QLoRA fine-tune on elastic GPU nodes that leaves a LoRA adapter in S3.",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": tell_defaults(schema_of(QLoRAFinetuneSpec)),
            "status": schema_of(QLoRAFinetuneStatus),
        },
        "x-kubernetes-validations": [{"rule": f"self.metadata.name.size() <= {names.MAX_NAME}", "message": too_long}],
    }
    version = {
        "name": names.VERSION,
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": schema},
        "subresources": {
            "status": {},
            "scale": {
                "specReplicasPath": ".spec.elasticPolicy.maxNodes",
                "statusReplicasPath": ".status.nodes.active",
            },
        },
        "additionalPrinterColumns": COLUMNS,
    }
    plural = {"plural": names.PLURAL, "singular": names.SINGULAR, "kind": names.KIND, "shortNames": [names.SHORT]}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{names.PLURAL}.{names.GROUP}"},
        "spec": {
            "group": names.GROUP,
            "names": {**plural, "listKind": f"{names.KIND}List", "categories": ["all", "ml"]},
            "scope": "Namespaced",
            "versions": [version],
        },
    }
