# All of the command line, as a user of a container would use it. FARCALL_DIR is set; the arguments are
# the user's id, and the commands of the profile: calls that it refuses, CALL=ERRNO.
set -ex
f=/farcall/farcall
cd /tmp

# Waits until `farcall ls` shows that of it.
shows() {
    until $f ls | grep "$1"; do sleep 0.05; done
}

# That command fails, and says this.
says() {
    expected=$1
    shift
    if "$@" > said 2>&1; then cat said; exit 1; fi
    cat said
    grep "$expected" said
}

id=$1
shift
test "$(id -u)" = "$id"
$f start one
$f ls | grep '^one .*detached'
says 'one' $f start one
test "$($f call one getuid)" = "$id"
grep '^Seccomp:.2' /proc/self/status
for refused; do
    says "${refused#*=}" $f call one $(echo "${refused%=*}" | tr , ' ')
done

# Calls, buffers, names and the log.
file=$($f call one openat AT_FDCWD /etc/passwd O_RDONLY)
$f call --output content one read $file @100 @len
cmp content /etc/passwd
$f call one read $file @1000 @len
$f names one
$f names one --unclaimed | grep passwd
$f log one | grep 'openat(.*= '
$f log one --json | grep '"name"'
$f names one --close-unclaimed
says EBADF $f call one read $file @10 @len

# A call that blocks: seen, interrupted, taken over, and left behind by a controller that is killed.
env --default-signal=INT $f call one pause > interrupted 2>&1 &
shows '^one .*pause'
kill -INT $!
if wait $!; then exit 1; fi
grep EINTR interrupted
$f call one pause > superseded 2>&1 &
shows '^one .*pause'
says one $f call --timeout 0 one getpid
test "$($f call --take-over one getuid)" = "$id"
if wait $!; then exit 1; fi
cat superseded
$f call one pause &
shows '^one .*pause'
kill -KILL $!
shows '^one .*detached .*pause'
$f log one | tail -1
test "$($f call --take-over one getuid)" = "$id"

# The image: written, serving, and in the place of the one that runs.
$f image -o image
test -x image
pid=$( (printf '\047'; printf '\0%.0s' $(seq 55)) | ./image | od -An -td8)
test $pid -gt 1
$f upgrade one
$f upgrade one --image image
test "$($f call one getuid)" = "$id"

# A socket that was removed.
rm $FARCALL_DIR/one.sock
$f ls | grep '^one .*unlinked'
$f restore one
$f ls | grep '^one .*detached'
$f stop one
$f start two
$f stop two --kill

$f demo
$f torture --kills 12 --seed 1
$f bench --only memory
test -z "$(ls -A $FARCALL_DIR)"
echo all done
