{{/* The operator's name: release vasto gives vasto-operator, release prod gives prod-vasto-operator. */}}
{{- define "vasto.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride }}
{{- else }}
{{- $name := default .Chart.Name .Values.nameOverride }}
{{- $base := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) }}
{{- printf "%s-operator" ($base | trunc 50 | trimSuffix "-") }}
{{- end }}
{{- end }}

{{- define "vasto.selector" -}}
app.kubernetes.io/name: vasto
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end }}

{{- define "vasto.labels" -}}
{{- $own := dict
  "app.kubernetes.io/name" "vasto"
  "app.kubernetes.io/instance" .Release.Name
  "app.kubernetes.io/component" "operator"
  "app.kubernetes.io/version" .Chart.AppVersion
  "app.kubernetes.io/managed-by" .Release.Service
  "app.kubernetes.io/part-of" "vasto"
  "helm.sh/chart" (printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_") }}
{{- toYaml (merge $own .Values.commonLabels) }}
{{- end }}

{{/* The gateways' name: release vasto gives vasto-gateway. */}}
{{- define "vasto.gateway" -}}
{{- printf "%s-gateway" (include "vasto.fullname" . | trimSuffix "-operator") }}
{{- end }}

{{- define "vasto.gatewaySelector" -}}
app.kubernetes.io/name: vasto
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: gateway
{{- end }}

{{- define "vasto.gatewayLabels" -}}
{{- $all := include "vasto.labels" . | fromYaml }}
{{- toYaml (set $all "app.kubernetes.io/component" "gateway") }}
{{- end }}

{{- define "vasto.serviceAccountName" -}}
{{- $default := ternary (include "vasto.fullname" .) "default" .Values.serviceAccount.create }}
{{- default $default .Values.serviceAccount.name }}
{{- end }}

{{- define "vasto.image" -}}
{{- with .Values.image }}
{{- if .digest }}
{{- printf "%s@%s" .repository .digest }}
{{- else }}
{{- printf "%s:%s" .repository (default $.Chart.AppVersion .tag) }}
{{- end }}
{{- end }}
{{- end }}

{{/* Where stores and clients reach the operator. */}}
{{- define "vasto.address" -}}
{{- printf "%s.%s.svc" (include "vasto.fullname" .) .Release.Namespace }}
{{- end }}

{{/* What every container of the chart runs under. */}}
{{- define "vasto.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{- define "vasto.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
seccompProfile:
  type: RuntimeDefault
{{- end }}
