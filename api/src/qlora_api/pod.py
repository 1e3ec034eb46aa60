"""What a resource says of its pods: their resources and the patch over them. Part of types.py's tree.

Rules: amounts are checked by the API server when the resource is applied, with Kubernetes' own quantity library for CEL
(1.29 and later), not when a pod is made of them; map and string sizes are bounded, which keeps the rules' cost within
the API server's budget.
"""

from typing import Annotated, Any

from pydantic import Field

from qlora_api.base import ApiModel, cel, rules

GPU = "nvidia.com/gpu"
LEAST_MEMORY = "64Mi"  # below it stands a wrong suffix: 6m is six thousandths of a byte

Quantity = Annotated[
    int | str,
    Field(
        json_schema_extra={
            "x-kubernetes-int-or-string": True,
            "maxLength": 32,
            **rules(
                cel(
                    "isQuantity(string(self)) && !quantity(string(self)).isLessThan(quantity('0'))",
                    'write a Kubernetes quantity: "2" or "500m" of a CPU, "16Gi" of memory (Gi, not GB)',
                )
            ),
        },
    ),
]
"""An amount such as `1`, `"500m"` or `"16Gi"`."""

Amounts = Annotated[
    dict[str, Quantity],
    Field(
        max_length=32,
        json_schema_extra=rules(
            cel(
                f"!('{GPU}' in self) || string(self['{GPU}']).matches('^[0-9]{{1,6}}$')",
                f"write a whole number of GPUs for {GPU}",
            ),
            cel(
                "!('memory' in self) || !isQuantity(string(self['memory']))"
                f" || !quantity(string(self['memory'])).isLessThan(quantity('{LEAST_MEMORY}'))",
                f"memory is less than {LEAST_MEMORY}: write for example 16Gi (m means thousandths of a byte)",
            ),
        ),
    ),
]


class ResourcesPerNode(ApiModel):
    """Resources of one trainer pod, as of a container."""

    requests: Amounts = Field({}, description="Requested amounts.")
    limits: Amounts = Field({GPU: 1}, description="Limits, GPUs among them.")


class PodMetadataPatch(ApiModel):
    """Labels and annotations of the pods."""

    labels: dict[str, str] = Field({}, description="Labels; those of the operator win.")
    annotations: dict[str, str] = Field({}, description="Annotations.")


class PodTemplatePatch(ApiModel):
    """Merged over the pods that the operator builds: labels, annotations, node selector, tolerations, volumes..."""

    metadata: PodMetadataPatch = PodMetadataPatch()
    spec: dict[str, Any] = Field(
        {},
        json_schema_extra={"x-kubernetes-preserve-unknown-fields": True},
        description="Fields of a PodSpec; lists of named things merge by name, the container is called trainer. A field"
        " that no PodSpec has fails the run by its name.",
    )
