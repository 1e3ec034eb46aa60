"""JSON to and from the API server: `kubernetes.aio` for addresses, TLS and tokens, plain dicts for data.

The client's typed models are left aside on purpose: server-side apply needs exactly the fields that we own, and lists
of pods are read every pass.
"""

import json
import os
from typing import Any

from kubernetes.aio import client, config

Json = dict[str, Any]
APPLY = "application/apply-patch+yaml"
_TIMEOUT_SECONDS = 10.0


class ApiError(OSError):
    """The API server answered with an error."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(f"{status} {reason}: {message}")
        self.status, self.reason, self.message = status, reason, message


class Kube:
    """One connection pool to one API server."""

    def __init__(self, api: client.ApiClient) -> None:
        self._api = api

    @classmethod
    async def connect(cls) -> "Kube":
        """In a pod with its service account, elsewhere with the current kubeconfig context."""
        settings = client.Configuration()
        if "KUBERNETES_SERVICE_HOST" in os.environ and "KUBECONFIG" not in os.environ:
            config.load_incluster_config(client_configuration=settings)
        else:
            await config.load_kube_config(client_configuration=settings)
        return cls(client.ApiClient(settings))

    async def close(self) -> None:
        await self._api.close()

    async def request(
        self,
        method: str,
        path: str,
        *,
        query: dict[str, str] | None = None,
        body: Json | None = None,
        content_type: str = "application/json",
    ) -> Json:
        """One call; raises ApiError for answers other than 2xx, aiohttp.ClientError or TimeoutError for none."""
        serialized = await self._api.param_serialize(
            method,
            path,
            query_params=list((query or {}).items()),
            header_params={"Accept": "application/json", "Content-Type": content_type},
            body=body,
            auth_settings=["BearerToken"],
        )
        response = await self._api.call_api(*serialized, _request_timeout=_TIMEOUT_SECONDS)
        text = await response.read()
        answer: Json = json.loads(text) if text.startswith(b"{") else {"message": text.decode(errors="replace")}
        if not 200 <= response.status < 300:
            reason = answer.get("reason") or response.reason or ""
            raise ApiError(response.status, reason, answer.get("message", ""))
        return answer
