{{- define "qlora.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" }}
{{- end }}

{{- define "qlora.fullname" -}}
{{- $name := include "qlora.name" . }}
{{- if .Values.fullnameOverride }}{{ .Values.fullnameOverride | trunc 50 | trimSuffix "-" }}
{{- else if contains $name .Release.Name }}{{ .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name $name | trunc 50 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "qlora.selector" -}}
app.kubernetes.io/name: {{ include "qlora.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "qlora.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{ include "qlora.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "qlora.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}{{ default (include "qlora.fullname" .) .Values.serviceAccount.name }}
{{- else }}{{ required "set serviceAccount.name, or let the chart make one with serviceAccount.create=true" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "qlora.tlsSecret" -}}
{{- default (printf "%s-tls" (include "qlora.fullname" .)) .Values.coordinator.tls.existingSecret }}
{{- end }}

{{- define "qlora.image" -}}
{{- with .image.digest }}{{ printf "%s@%s" $.image.repository . }}
{{- else }}{{ printf "%s:%s" .image.repository (default .appVersion .image.tag) }}
{{- end }}
{{- end }}

{{- /* One variable for each setting of the operator that the values name: src/qlora_operator/settings.py. */}}
{{- define "qlora.environment" -}}
{{- $host := printf "%s.%s.svc" (include "qlora.fullname" .) .Release.Namespace }}
{{- $trainer := .Values.trainer }}
{{- $settings := dict
  "trainerImage" (include "qlora.image" (dict "image" $trainer.image "appVersion" .Chart.AppVersion))
  "imagePullPolicy" $trainer.image.pullPolicy
  "imagePullSecrets" (join "," $trainer.imagePullSecrets)
  "cacheVolume" ($trainer.cacheVolume | empty | ternary "" (toJson $trainer.cacheVolume))
  "snapshotSize" $trainer.snapshotSize
  "priorityClass" $trainer.priorityClass
  "gracePeriodSeconds" $trainer.gracePeriodSeconds
  "tolerationSeconds" $trainer.tolerationSeconds
  "coordinatorUrl" (default (printf "https://%s:%v" $host .Values.coordinator.port) .Values.coordinator.url)
  "caFile" "/etc/qlora-operator/tls/ca.crt"
  "tlsCert" "/etc/qlora-operator/tls/tls.crt"
  "tlsKey" "/etc/qlora-operator/tls/tls.key"
  "listenPort" .Values.coordinator.port
  "metricsPort" .Values.metrics.port
  "namespaces" (join "," .Values.watchNamespaces)
  "logLevel" .Values.log.level
  "logFormat" .Values.log.format }}
{{- range $key, $value := merge $settings .Values.timing }}
{{- if ne (toString $value) "" }}
- name: QLORA_{{ $key | snakecase | upper }}
  value: {{ $value | toString | quote }}
{{- end }}
{{- end }}
{{- end }}
