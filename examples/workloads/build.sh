# A build on the assigned disk, as `make` does it: sources are unpacked, read and compiled module by module, the
# objects written, all of them linked; then two modules change and are built again. Between, the disk rests.
#
#     coiommu run --machine qemu --workload script:examples/workloads/build.sh
#
# Compiling is gzip, linking is cat: the program, unpacked, must be the sources again. Half a minute in an emulated
# guest; fails when a byte is not what it was.
set -eu
modules=24
sources=16
disk=/dev/vda
tree=/mnt

# The sources, some 9 KiB each and always the same: to files below a folder, or without one to standard output.
unpack() {
	awk -v modules=$modules -v sources=$sources -v folder="${1-}" 'BEGIN {
		seed = 1
		for (m = 1; m <= modules; m++) for (s = 1; s <= sources; s++) {
			file = folder == "" ? "/dev/stdout" : sprintf("%s/m%02d/s%02d.c", folder, m, s)
			seed = (seed * 1103515245 + 12345) % 2147483648
			for (lines = 80 + seed % 200; lines > 0; lines--) {
				seed = (seed * 1103515245 + 12345) % 2147483648
				printf "static int f%d(int x) { return x * %d + m%d; }\n", lines, seed, m >file
			}
			if (folder != "") close(file)
		}
	}'
}

# Pages that the build would still have from before: a build of yesterday's sources has none.
forget() {
	sync
	echo 3 >/proc/sys/vm/drop_caches
}

compile() { # module
	for source in "$tree/$1"/*.c; do
		gzip -c "$source" >"${source%.c}.o"
	done
	cat "$tree/$1"/*.o >"$tree/$1.a"
	sleep 0.2
}

link() {
	cat "$tree"/m*.a >"$tree/program"
	sync
}

check() { # what, checksum
	[ "$2" = "$expected" ] && return
	echo "$1: $2 is not $expected"
	exit 1
}

expected=$(unpack | sha256sum)
mke2fs -b 4096 $disk >/dev/null
mount -t ext4 $disk $tree
for module in $(seq -w $modules); do
	mkdir $tree/m$module
done
unpack $tree
forget
sleep 2

for module in $(seq -w $modules); do
	compile m$module
done
sync
sleep 3
link
sleep 3

forget
rm $tree/m03/*.o $tree/m17/*.o $tree/program
compile m03
compile m17
link

forget
check sources "$(cat $tree/m*/*.c | sha256sum)"
check program "$(zcat $tree/program | sha256sum)"
umount $tree
echo "built: ${expected%% *}"
