#!/usr/bin/env bash
# Gives the tests marked `container` an engine on a Debian machine that has none running, as root:
#   tests/engine.sh start   installs and starts docker and podman; status 1 and a reason if none answers
#   tests/engine.sh stop    ends what `start` began
# No systemd, no bridge, no firewall rules: it works where CI itself is a bare virtual machine.
set -euo pipefail

STATE=${ENGINE_STATE:-${TMPDIR:-/tmp}/ilora-bench-engine}
PODMAN_CONF=/etc/containers/containers.conf

docker_answers() { [ -n "$(docker info --format '{{.ServerVersion}}' 2>/dev/null)" ]; }
podman_answers() { podman info --format '{{.Version.Version}}' >/dev/null 2>&1; }

install() {
  if command -v dockerd >/dev/null && command -v podman >/dev/null; then return; fi
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "engine: installing docker.io and podman needs root and apt-get" >&2
    return
  fi
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    docker.io podman runc >/dev/null || echo "engine: docker.io and podman could not be installed" >&2
}

start_docker() {
  if docker_answers || ! command -v dockerd >/dev/null || [ "$(id -u)" != 0 ]; then return; fi
  setsid nohup dockerd --iptables=false --ip6tables=false --bridge=none \
    --data-root "$STATE/docker" --exec-root "$STATE/exec" --pidfile "$STATE/docker.pid" \
    >"$STATE/dockerd.log" 2>&1 </dev/null &
  for _ in $(seq 60); do
    if docker_answers; then return; fi
    sleep 0.5
  done
  echo "engine: dockerd does not answer; its last words:" >&2
  tail -n 5 "$STATE/dockerd.log" >&2
}

# podman raises limits by default, which a machine without CAP_SYS_RESOURCE forbids.
configure_podman() {
  if [ "$(id -u)" != 0 ] || [ -e "$PODMAN_CONF" ] || ! command -v podman >/dev/null; then return; fi
  mkdir -p "$(dirname "$PODMAN_CONF")"
  printf '%s\n' '[containers]' 'default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]' \
    '[engine]' 'runtime = "runc"' 'cgroup_manager = "cgroupfs"' 'events_logger = "file"' \
    >"$PODMAN_CONF"
  touch "$STATE/podman-configured"
}

case "${1:-}" in
  start)
    mkdir -p "$STATE"
    install
    start_docker
    configure_podman
    if docker_answers; then echo "engine: docker $(docker info --format '{{.ServerVersion}}')"; fi
    if podman_answers; then echo "engine: podman $(podman info --format '{{.Version.Version}}')"; fi
    if ! docker_answers && ! podman_answers; then
      echo "engine: neither docker nor podman answers; the tests marked container are skipped" >&2
      exit 1
    fi
    ;;
  stop)
    if [ -e "$STATE/docker.pid" ]; then kill "$(cat "$STATE/docker.pid")" || true; fi
    if [ -e "$STATE/podman-configured" ]; then rm -f "$PODMAN_CONF" "$STATE/podman-configured"; fi
    ;;
  *)
    sed -n '2,5p' "$0"
    exit 2
    ;;
esac
