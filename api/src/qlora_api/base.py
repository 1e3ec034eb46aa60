"""What every API type has in common: frozen, camelCase on the wire, unknown fields refused."""

from datetime import datetime
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, PlainSerializer
from pydantic.alias_generators import to_camel


class ApiModel(BaseModel):
    """Frozen; snake_case in Python, camelCase on the wire; an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=to_camel, populate_by_name=True)

    def to_wire(self) -> dict[str, Any]:
        """JSON-ready dict with camelCase keys, without fields that are None."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def _rfc3339(moment: datetime) -> str:
    """Kubernetes' `metav1.Time` has seconds only; microseconds here keep deadlines exact (`metav1.MicroTime`)."""
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


Time = Annotated[datetime, PlainSerializer(_rfc3339, return_type=str, when_used="json")]
"""A moment in UTC, RFC 3339 with microseconds on the wire."""

Measure = Annotated[float, AfterValidator(lambda value: float(f"{value:.5g}"))]
"""A measured number; five digits are what a person reads in `kubectl get`."""


def cel(rule: str, message: str) -> dict[str, str]:
    """One CEL rule (`x-kubernetes-validations`) with the sentence that the API server answers."""
    return {"rule": rule, "message": message}


def rules(*validations: dict[str, str]) -> dict[str, Any]:
    """Schema extra that carries CEL rules."""
    return {"x-kubernetes-validations": list(validations)}
