#!/usr/bin/env bash
# sshd_host ROOT VENV COMMAND...: the command in a copy of the checkout ROOT, beside an sshd on port 22 that lets root in with root's key.
#
# For a host that ends with this (.ci/isolated ROOT/tests/cluster/sshd_host.sh ...): root gets a new home, whose login shells find VENV/bin.
set -euo pipefail
root=$1 venv=$2
shift 2

export HOME=/tmp/home
# ssh and sshd ask the system where a home is, and not $HOME.
sed "s|^root:.*|root:x:0:0:root:$HOME:/bin/bash|" /etc/passwd > /tmp/passwd
mount --bind /tmp/passwd /etc/passwd

mkdir -p "$HOME/.ssh" /run/sshd
chmod 700 "$HOME" "$HOME/.ssh"
ssh-keygen -q -t ed25519 -N '' -f "$HOME/.ssh/id_ed25519"
ssh-keygen -q -t ed25519 -N '' -f /tmp/host_key
cp "$HOME/.ssh/id_ed25519.pub" "$HOME/.ssh/authorized_keys"
echo "export PATH=$venv/bin:\$PATH" | tee "$HOME/.bashrc" > "$HOME/.profile"

cat > /tmp/sshd_config << CONFIG
ListenAddress 127.0.0.1
HostKey /tmp/host_key
AuthorizedKeysFile $HOME/.ssh/authorized_keys
UsePAM no
StrictModes no  # /tmp, above the home, is everybody's
PidFile none
CONFIG
/usr/sbin/sshd -D -e -f /tmp/sshd_config 2> /tmp/sshd.log &
for _ in $(seq 300); do
  ssh -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null root@127.0.0.1 true 2> /tmp/ssh.log && break
  sleep 0.1
done
ssh -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR root@127.0.0.1 true || { cat /tmp/sshd.log; exit 1; }

mkdir /tmp/checkout
cp -r "$root"/{README.md,LICENSE,Makefile,pyproject.toml,constraints.txt,etha_ray,actors,cluster_configs} /tmp/checkout
cd /tmp/checkout
export PATH=$venv/bin:$PATH
"$@"
