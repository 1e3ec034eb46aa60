#!/bin/bash
# PID 1 of one machine made of namespaces: sets its mounts up, says so, then only reaps.
# usage: init.sh HOSTNAME FOLDER [DIRECTORY ...]   the directories get private content below FOLDER
set -euo pipefail
name=$1 folder=$2
shift 2

mount --make-rprivate /
mount --make-rshared / # mounts of pods with Bidirectional propagation stay within this machine
hostname "$name"
mount -t tmpfs -o mode=755 run /run
mkdir -p /run/lock /run/netns /run/sysctl

for directory in "$@"; do
  mkdir -p "$directory" "$folder$directory"
  mount --bind "$folder$directory" "$directory"
done

# the kubelet writes these, and they belong to the whole machine: give it private copies to write to
for setting in vm/overcommit_memory=1 vm/panic_on_oom=0 kernel/panic=10 kernel/panic_on_oops=1 \
  kernel/keys/root_maxkeys=1000000 kernel/keys/root_maxbytes=25000000; do
  copy=/run/sysctl/$(tr / . <<<"${setting%%=*}")
  echo "${setting#*=}" >"$copy"
  mount --bind "$copy" "/proc/sys/${setting%%=*}"
done

# a machine id of its own, the same after a restart
md5sum <<<"$folder" | cut -c1-32 >/run/machine-id
if [ -e /etc/machine-id ]; then mount --bind /run/machine-id /etc/machine-id; fi

sysctl -qw net.ipv4.ip_forward=1
# so that the answer of a Service's pod on the same node passes connection tracking on its way back
if [ -e /proc/sys/net/bridge ]; then sysctl -qw net.bridge.bridge-nf-call-iptables=1; fi
ip link set lo up
touch "$folder/ready"

trap 'exit 0' TERM INT
sleep infinity &
wait $! # bash reaps whatever ends meanwhile
