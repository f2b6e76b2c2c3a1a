// SPDX-License-Identifier: GPL-2.0
/*
 * With selftest=1 the module knows no device and hooks no function. A debugfs
 * file takes commands that call what counts mappings and asks for pins, over a
 * table that no host looks at; the device is a script.
 *
 * One command per open file: write it, then read what came of it.
 *
 *	reset BATCH [FRAMES]		an empty table; a device that takes BATCH ranges, and
 *					FRAMES frames, in a request
 *	device on|off
 *	pin_dirty on|off		whether it has PIN_DIRTY; off after a reset
 *	direction to|from|both		of the mappings that follow; both after a reset
 *	watch GFN...			whose units are shown
 *	set GFN WORD			make a unit WORD
 *	units				of the watched frames: those that are not 0
 *	answer LENGTH STATUS GFN...	to the next request: the device sets P of GFN...,
 *					then writes LENGTH bytes, of which one is STATUS
 *	silence GFN...			to the next request: the device sets P, and no more
 *	late GFN...			the request comes back; P of GFN... was set
 *	map_single GFN OFFSET SIZE
 *	map_sg GFN OFFSET SIZE ...
 *	unmap_single, unmap_sg		alike
 *	remap_sg ...			map and unmap a list remapped: selftest_remap.c;
 *					there is no device then until the next reset
 *
 * Mappings show each request as it was sent and the units at that moment, what
 * was returned, and the counters that have changed.
 */
#include <linux/dma-direct.h>
#include <linux/fs.h>
#include <linux/mutex.h>
#include <linux/pfn.h>
#include <linux/scatterlist.h>
#include <linux/seq_buf.h>
#include <linux/smp.h>
#include <linux/string.h>

#include "dtt.h"

#define WORDS_MAX	64
#define FRAMES_MAX	WORDS_MAX
#define PIECES_MAX	(WORDS_MAX / 3)
#define ANSWERS_MAX	8
#define PIECE_SIZE_MAX	(256 * PAGE_SIZE)

#define ENDPOINT	0x20

struct frames {
	unsigned int nr;
	u64 gfn[FRAMES_MAX];
};

struct answer {
	struct frames pins;
	int length;		/* or -ETIMEDOUT */
	u8 status;
};

/* Protects all below: one command at a time. */
static DEFINE_MUTEX(selftest_lock);
static struct coiommu_hook hook = { .endpoint = ENDPOINT };
static struct frames watched;
static struct answer answers[ANSWERS_MAX];
static unsigned int nr_answers, next_answer;
static bool returned;
static enum dma_data_direction direction;
static struct virtio_iommu_req_tail *tail_of_request;
static char text[SIMPLE_TRANSACTION_LIMIT];
static struct seq_buf out;

static void show_units(void)
{
	unsigned int i;

	seq_buf_printf(&out, "units");
	for (i = 0; i < watched.nr; i++) {
		atomic_t *unit = coiommu_dtt_unit(watched.gfn[i]);

		if (unit && atomic_read(unit))
			seq_buf_printf(&out, " %llu=%08x", watched.gfn[i], atomic_read(unit));
	}
	seq_buf_printf(&out, "\n");
}

static void set_pinned(const struct frames *frames)
{
	unsigned int i;

	for (i = 0; i < frames->nr; i++)
		atomic_or(COIOMMU_TU_PINNED, coiommu_dtt_unit(frames->gfn[i]));
}

static int script_send(const void *request, size_t size, void *reply, size_t reply_size)
{
	const u8 *bytes = request;
	size_t i;

	seq_buf_printf(&out, "request ");
	for (i = 0; i < size; i++)
		seq_buf_printf(&out, "%02x", bytes[i]);
	seq_buf_printf(&out, "\n");
	show_units();
	tail_of_request = reply;
	return next_answer < nr_answers ? 0 : -ENODATA;
}

static int script_await(void)
{
	const struct answer *answer = &answers[next_answer++];

	set_pinned(&answer->pins);
	if (answer->length >= (int)sizeof(*tail_of_request))
		tail_of_request->status = answer->status;
	return answer->length;
}

static bool script_returned(void)
{
	bool now = returned;

	returned = false;
	return now;
}

static const struct coiommu_channel script = {
	.send		= script_send,
	.await		= script_await,
	.returned	= script_returned,
};

/* Frames that have a unit, unless they are @any. */
static int parse_frames(char **words, unsigned int nr, struct frames *frames, bool any)
{
	unsigned int i;
	int ret;

	for (i = 0; i < nr; i++) {
		ret = kstrtou64(words[i], 0, &frames->gfn[i]);
		if (ret)
			return ret;
		if (!any && !coiommu_dtt_unit(frames->gfn[i]))
			return -ENXIO;
	}
	frames->nr = nr;
	return 0;
}

static int start(u32 batch_max, u32 frames_max)
{
	int ret;

	ret = coiommu_dtt_create();
	if (ret)
		return ret;
	coiommu_pin_limit(batch_max, frames_max);
	ret = coiommu_requests_open(&script);
	if (!ret)
		coiommu_requests_enable();
	return ret;
}

static void stop(void)
{
	coiommu_requests_disable();
	coiommu_requests_close();
	coiommu_dtt_destroy();
	coiommu_dtt_mark_writable(false);
	direction = DMA_BIDIRECTIONAL;
	watched.nr = 0;
	nr_answers = 0;
	returned = false;
}

static int do_reset(char **words, unsigned int nr)
{
	u32 batch_max, frames_max = U32_MAX;
	int ret;

	if (nr != 1 && nr != 2)
		return -EINVAL;
	ret = kstrtou32(words[0], 0, &batch_max);
	if (!ret && nr == 2)
		ret = kstrtou32(words[1], 0, &frames_max);
	if (ret)
		return ret;
	if (!batch_max || !frames_max)
		return -ERANGE;
	stop();
	ret = start(batch_max, frames_max);
	if (ret)
		stop();
	return ret;
}

static int do_device(char **words, unsigned int nr)
{
	bool on;
	int ret;

	if (nr != 1)
		return -EINVAL;
	ret = kstrtobool(words[0], &on);
	if (ret)
		return ret;
	if (on)
		coiommu_requests_enable();
	else
		coiommu_requests_disable();
	return 0;
}

static int do_pin_dirty(char **words, unsigned int nr)
{
	bool on;
	int ret;

	if (nr != 1)
		return -EINVAL;
	ret = kstrtobool(words[0], &on);
	if (!ret)
		coiommu_dtt_mark_writable(on);
	return ret;
}

static int do_direction(char **words, unsigned int nr)
{
	static const char * const names[] = {
		[DMA_BIDIRECTIONAL]	= "both",
		[DMA_TO_DEVICE]		= "to",
		[DMA_FROM_DEVICE]	= "from",
	};
	int ret;

	if (nr != 1)
		return -EINVAL;
	ret = match_string(names, ARRAY_SIZE(names), words[0]);
	if (ret < 0)
		return ret;
	direction = ret;
	return 0;
}

static int do_watch(char **words, unsigned int nr)
{
	return parse_frames(words, nr, &watched, true);
}

static int do_set(char **words, unsigned int nr)
{
	struct frames frame;
	u32 value;
	int ret;

	if (nr != 2)
		return -EINVAL;
	ret = parse_frames(words, 1, &frame, false) ?: kstrtou32(words[1], 0, &value);
	if (!ret)
		atomic_set(coiommu_dtt_unit(frame.gfn[0]), value);
	return ret;
}

static int do_units(char **words, unsigned int nr)
{
	if (nr)
		return -EINVAL;
	show_units();
	return 0;
}

static int add_answer(int length, u8 status, char **pins, unsigned int nr_pins)
{
	struct answer *answer = &answers[nr_answers];
	int ret;

	if (nr_answers == ANSWERS_MAX)
		return -ENOSPC;
	ret = parse_frames(pins, nr_pins, &answer->pins, false);
	if (ret)
		return ret;
	answer->length = length;
	answer->status = status;
	nr_answers++;
	return 0;
}

static int do_answer(char **words, unsigned int nr)
{
	u8 length, status;
	int ret;

	if (nr < 2)
		return -EINVAL;
	ret = kstrtou8(words[0], 0, &length) ?: kstrtou8(words[1], 0, &status);
	return ret ?: add_answer(length, status, words + 2, nr - 2);
}

static int do_silence(char **words, unsigned int nr)
{
	return add_answer(-ETIMEDOUT, 0, words, nr);
}

static int do_late(char **words, unsigned int nr)
{
	struct frames pins;
	int ret;

	ret = parse_frames(words, nr, &pins, false);
	if (ret)
		return ret;
	set_pinned(&pins);
	returned = true;
	return 0;
}

/* Sizes are bounded because a command is not preempted; nothing touches the memory itself. */
static int parse_pieces(char **words, unsigned int nr, struct scatterlist *sgl)
{
	unsigned int i;

	sg_init_table(sgl, nr / 3);
	for (i = 0; i < nr / 3; i++, words += 3) {
		u64 gfn, offset, size;
		int ret;

		ret = kstrtou64(words[0], 0, &gfn) ?: kstrtou64(words[1], 0, &offset) ?:
			kstrtou64(words[2], 0, &size);
		if (ret)
			return ret;
		if (gfn > PHYS_PFN(ENTRY_ADDRESS) || offset >= PAGE_SIZE || size > PIECE_SIZE_MAX)
			return -ERANGE;
		sg_dma_address(&sgl[i]) = phys_to_dma(&hook.shadow, PFN_PHYS(gfn) + offset);
		sg_dma_len(&sgl[i]) = size;
	}
	return 0;
}

static int map_single(struct scatterlist *sgl, int nents)
{
	return coiommu_track(&hook, sg_dma_address(sgl), sg_dma_len(sgl), direction);
}

static int map_sg(struct scatterlist *sgl, int nents)
{
	return coiommu_track_sg(&hook, sgl, nents, direction);
}

static int unmap_single(struct scatterlist *sgl, int nents)
{
	coiommu_untrack(&hook, sg_dma_address(sgl), sg_dma_len(sgl), direction);
	return 0;
}

static int unmap_sg(struct scatterlist *sgl, int nents)
{
	coiommu_untrack_sg(&hook, sgl, nents, direction);
	return 0;
}

static int run_mapping(char **words, unsigned int nr, unsigned int pieces_max,
		       int (*func)(struct scatterlist *sgl, int nents))
{
	struct scatterlist sgl[PIECES_MAX];
	struct coiommu_counters before, *now;
	int ret;

	if (!nr || nr % 3 || nr / 3 > pieces_max)
		return -EINVAL;
	ret = parse_pieces(words, nr, sgl);
	if (ret)
		return ret;

	/* Nobody else counts, so what changes on this CPU is ours. */
	get_cpu();
	now = this_cpu_ptr(&coiommu_counters);
	before = *now;
	ret = func(sgl, nr / 3);
	seq_buf_printf(&out, "returned %d\ncounters", ret);
#define SHOW_CHANGE(name)							\
	if (now->name != before.name)						\
		seq_buf_printf(&out, " " #name "=%llu", now->name - before.name);
	COIOMMU_COUNTERS(SHOW_CHANGE)
#undef SHOW_CHANGE
	put_cpu();
	seq_buf_printf(&out, "\n");
	next_answer = 0;
	nr_answers = 0;
	return 0;
}

static int do_map_single(char **words, unsigned int nr)
{
	return run_mapping(words, nr, 1, map_single);
}

static int do_map_sg(char **words, unsigned int nr)
{
	return run_mapping(words, nr, PIECES_MAX, map_sg);
}

static int do_unmap_single(char **words, unsigned int nr)
{
	return run_mapping(words, nr, 1, unmap_single);
}

static int do_unmap_sg(char **words, unsigned int nr)
{
	return run_mapping(words, nr, PIECES_MAX, unmap_sg);
}

static int do_remap_sg(char **words, unsigned int nr)
{
	return coiommu_selftest_remap(words, nr, direction, &out);
}

static const struct {
	const char *name;
	int (*run)(char **words, unsigned int nr);
} commands[] = {
	{ "reset", do_reset },
	{ "device", do_device },
	{ "pin_dirty", do_pin_dirty },
	{ "direction", do_direction },
	{ "watch", do_watch },
	{ "set", do_set },
	{ "units", do_units },
	{ "answer", do_answer },
	{ "silence", do_silence },
	{ "late", do_late },
	{ "map_single", do_map_single },
	{ "map_sg", do_map_sg },
	{ "unmap_single", do_unmap_single },
	{ "unmap_sg", do_unmap_sg },
	{ "remap_sg", do_remap_sg },
};

static int run_command(char *line)
{
	char *words[WORDS_MAX], *word;
	unsigned int i, nr = 0;

	while ((word = strsep(&line, " \n"))) {
		if (!*word)
			continue;
		if (nr == WORDS_MAX)
			return -E2BIG;
		words[nr++] = word;
	}
	for (i = 0; nr && i < ARRAY_SIZE(commands); i++) {
		if (strcmp(words[0], commands[i].name))
			continue;
		if (!coiommu_dtt.root && commands[i].run != do_reset)
			return -ENODEV;		/* a reset had no memory */
		return commands[i].run(words + 1, nr - 1);
	}
	return -EINVAL;
}

static ssize_t selftest_write(struct file *file, const char __user *from, size_t size, loff_t *pos)
{
	char *line = simple_transaction_get(file, from, size);
	int ret;

	if (IS_ERR(line))
		return PTR_ERR(line);

	mutex_lock(&selftest_lock);
	seq_buf_init(&out, text, sizeof(text));
	ret = run_command(line);
	if (!ret && seq_buf_has_overflowed(&out))
		ret = -EOVERFLOW;
	if (!ret) {
		memcpy(line, text, seq_buf_used(&out));
		simple_transaction_set(file, seq_buf_used(&out));
	}
	mutex_unlock(&selftest_lock);
	return ret ?: size;
}

const struct file_operations coiommu_selftest_fops = {
	.owner		= THIS_MODULE,
	.write		= selftest_write,
	.read		= simple_transaction_read,
	.release	= simple_transaction_release,
	.llseek		= no_llseek,
};

int coiommu_selftest_init(void)
{
	int ret = start(1, U32_MAX);

	if (ret)
		stop();
	return ret;
}

void coiommu_selftest_exit(void)
{
	stop();
}
