#!/usr/bin/env bash
# A real S3 server on one machine: Ceph's monitor, one OSD on a sparse file, RADOS gateway; loopback.
#   ceph.sh start EMPTY_DIR     last line of output: the endpoint; key cephkey123 / cephsecret123
#   ceph.sh stop DIR            ends exactly the processes that start wrote to DIR/pids
# Needs: apt-get install -y --no-install-recommends ceph-mon ceph-osd ceph-common radosgw
set -eu
command=${1:?start or stop}
dir=${2:?a folder}

if [ "$command" = stop ]; then
  [ -f "$dir/pids" ] || exit 0
  while read -r pid; do kill "$pid" 2>/dev/null || true; done < "$dir/pids"
  while read -r pid; do
    for _ in $(seq 100); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
    kill -9 "$pid" 2>/dev/null || true
  done < "$dir/pids"
  rm -rf "$dir/osd"
  exit 0
fi

# Free ports, asked for together so that they differ.
read -r mon2 mon1 rgw < <(python3 - <<'PY'
import socket
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
print(*(s.getsockname()[1] for s in sockets))
PY
)
mkdir -p "$dir"/mon/a "$dir"/osd/0 "$dir"/log "$dir"/run
: > "$dir/pids"
fsid=$(cat /proc/sys/kernel/random/uuid)
osd=$(cat /proc/sys/kernel/random/uuid)
conf=$dir/ceph.conf
cat > "$conf" <<CONF
[global]
fsid = $fsid
mon_host = [v2:127.0.0.1:$mon2/0,v1:127.0.0.1:$mon1/0]
public_network = 127.0.0.0/8
auth_cluster_required = cephx
auth_service_required = cephx
auth_client_required = cephx
auth_allow_insecure_global_id_reclaim = false
run_dir = $dir/run
admin_socket = $dir/run/\$name.asok
log_file = $dir/log/\$name.log
pid_file = $dir/run/\$name.pid
keyring = $dir/keyring
crash_dir = $dir/log
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
osd_pool_default_pg_autoscale_mode = off
mon_allow_pool_size_one = true
osd_crush_chooseleaf_type = 0
mon_osd_full_ratio = .99
mon_data_avail_warn = 1
mon_data_avail_crit = 1
mon_max_pg_per_osd = 1000
[mon.a]
mon_data = $dir/mon/a
[osd.0]
osd_data = $dir/osd/0
osd_objectstore = bluestore
bluestore_block_size = 8589934592
bluestore_block_create = true
bluestore_fsck_on_mount = false
osd_memory_target = 1073741824
[client.rgw]
rgw_frontends = beast endpoint=127.0.0.1:$rgw
rgw_dns_name = 127.0.0.1
rgw_enable_usage_log = false
rgw_enable_ops_log = false
rgw_thread_pool_size = 64
debug_rgw = 0
CONF
addresses="[v2:127.0.0.1:$mon2,v1:127.0.0.1:$mon1]"
monmaptool --create --clobber --fsid "$fsid" --addv a "$addresses" "$dir/monmap" > /dev/null
key() { ceph-authtool "$dir/keyring" --gen-key -n "$@" > /dev/null; }
ceph-authtool --create-keyring "$dir/keyring" > /dev/null
key mon. --cap mon 'allow *'
key client.admin --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *'
key osd.0 --cap mon 'allow profile osd' --cap osd 'allow *'
key client.rgw --cap mon 'allow rw' --cap osd 'allow rwx'

# Each daemon in the foreground of its own background job, so that $! is its process id.
daemon() { "$@" > "$dir/log/$(basename "$1").out" 2>&1 & echo $! >> "$dir/pids"; }
ceph() { timeout 30 env ceph -c "$conf" --keyring "$dir/keyring" "$@" > /dev/null 2>&1; }

ceph-mon -c "$conf" --mkfs -i a --monmap "$dir/monmap" --keyring "$dir/keyring"
daemon ceph-mon -c "$conf" -i a -f
ceph osd set-nearfull-ratio 0.90
ceph osd set-backfillfull-ratio 0.95
ceph osd set-full-ratio 0.98
ceph osd new "$osd" 0
ceph-osd -c "$conf" -i 0 --mkfs --osd-uuid "$osd" > "$dir/log/mkfs.out" 2>&1
daemon ceph-osd -c "$conf" -i 0 -f
ceph osd crush add osd.0 1.0 root=default host=localhost
daemon radosgw -c "$conf" -n client.rgw -f
for _ in $(seq 120); do
  curl -s -o /dev/null "http://127.0.0.1:$rgw" && break
  sleep 0.5
done
curl -s -o /dev/null "http://127.0.0.1:$rgw" || { tail -n 5 "$dir"/log/*.out >&2; exit 1; }
timeout 60 radosgw-admin -c "$conf" -n client.rgw user create --uid=test --display-name=test \
  --access-key=cephkey123 --secret-key=cephsecret123 > /dev/null 2>&1
echo "http://127.0.0.1:$rgw"
