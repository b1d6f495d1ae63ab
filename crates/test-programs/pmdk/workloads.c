// The workloads of `src/bin/workloads.rs` with libpmemobj, for `cargo xtask bench heap`.
//
// The same keys in the same order, one transaction for each change, one lock around each structure:
//   hash    chained, with as many buckets as keys from the beginning (it never has to grow)
//   tree    B-tree of order 16, values in the nodes
//   queue   ring of 4096 numbers with head and tail
//   swap    array of 10 000 strings of 64 bytes, two of which change places
//
// Usage: pmdk FILE WORKLOAD THREADS CHANGES; prints seconds for all changes, for all lookups (0 where there are
// none), and the 99th percentile of single changes, of which every eighth is timed.

#include <libpmemobj.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define ORDER 16
#define RING 4096
#define STRINGS 10000
#define LENGTH 64
#define SAMPLE 8

struct entry {
	uint64_t key, value;
	PMEMoid next;
};

struct node {
	uint64_t rows;
	uint64_t keys[ORDER - 1], values[ORDER - 1];
	PMEMoid below[ORDER];
};

struct root {
	uint64_t count;
	uint64_t buckets;
	PMEMoid table;
	PMEMoid tree;
	uint64_t head, tail;
	uint64_t ring[RING];
	PMEMoid strings;
};

static PMEMobjpool *pool;
static struct root *root;
static uint64_t changes;
static int threads;
static double *sampled;
static pthread_rwlock_t lock = PTHREAD_RWLOCK_INITIALIZER;

static void check(int failed, const char *what)
{
	if (failed) {
		fprintf(stderr, "pmdk: %s: %s\n", what, pmemobj_errormsg());
		exit(1);
	}
}

static uint64_t mix(uint64_t n)
{
	n += 0x9e3779b97f4a7c15;
	n = (n ^ (n >> 30)) * 0xbf58476d1ce4e5b9;
	n = (n ^ (n >> 27)) * 0x94d049bb133111eb;
	return n ^ (n >> 31);
}

static void begin(void)
{
	check(pmemobj_tx_begin(pool, NULL, TX_PARAM_NONE), "begin");
}

static void end(void)
{
	pmemobj_tx_commit();
	check(pmemobj_tx_end(), "end");
}

static void snapshot(void *at, size_t len)
{
	check(pmemobj_tx_add_range_direct(at, len), "add range");
}

static void hash_insert(uint64_t key, uint64_t value)
{
	PMEMoid *bucket = (PMEMoid *)pmemobj_direct(root->table) + mix(key) % root->buckets;
	for (PMEMoid at = *bucket; !OID_IS_NULL(at);) {
		struct entry *entry = pmemobj_direct(at);
		if (entry->key == key) {
			snapshot(&entry->value, sizeof(entry->value));
			entry->value = value;
			return;
		}
		at = entry->next;
	}
	PMEMoid fresh = pmemobj_tx_alloc(sizeof(struct entry), 1);
	check(OID_IS_NULL(fresh), "alloc");
	struct entry *entry = pmemobj_direct(fresh);
	entry->key = key;
	entry->value = value;
	entry->next = *bucket;
	snapshot(bucket, sizeof(*bucket));
	*bucket = fresh;
	snapshot(&root->count, sizeof(root->count));
	root->count++;
}

static int hash_get(uint64_t key)
{
	PMEMoid at = ((PMEMoid *)pmemobj_direct(root->table))[mix(key) % root->buckets];
	while (!OID_IS_NULL(at)) {
		struct entry *entry = pmemobj_direct(at);
		if (entry->key == key)
			return 1;
		at = entry->next;
	}
	return 0;
}

static uint64_t place(const struct node *node, uint64_t key)
{
	uint64_t i = 0;
	while (i < node->rows && node->keys[i] < key)
		i++;
	return i;
}

static void shift(struct node *node, uint64_t i)
{
	memmove(node->keys + i + 1, node->keys + i, (node->rows - i) * sizeof(uint64_t));
	memmove(node->values + i + 1, node->values + i, (node->rows - i) * sizeof(uint64_t));
}

static void cut(struct node *node, uint64_t i)
{
	struct node *left = pmemobj_direct(node->below[i]);
	PMEMoid fresh = pmemobj_tx_zalloc(sizeof(struct node), 2);
	check(OID_IS_NULL(fresh), "alloc");
	struct node *right = pmemobj_direct(fresh);
	uint64_t middle = left->rows / 2;
	snapshot(left, sizeof(*left));
	snapshot(node, sizeof(*node));
	right->rows = left->rows - middle - 1;
	memcpy(right->keys, left->keys + middle + 1, right->rows * sizeof(uint64_t));
	memcpy(right->values, left->values + middle + 1, right->rows * sizeof(uint64_t));
	memcpy(right->below, left->below + middle + 1, (right->rows + 1) * sizeof(PMEMoid));
	shift(node, i);
	node->keys[i] = left->keys[middle];
	node->values[i] = left->values[middle];
	memmove(node->below + i + 2, node->below + i + 1, (node->rows - i) * sizeof(PMEMoid));
	node->below[i + 1] = fresh;
	node->rows++;
	left->rows = middle;
}

static void tree_insert(uint64_t key, uint64_t value)
{
	struct node *node = pmemobj_direct(root->tree);
	if (node->rows == ORDER - 1) {
		PMEMoid fresh = pmemobj_tx_zalloc(sizeof(struct node), 2);
		check(OID_IS_NULL(fresh), "alloc");
		node = pmemobj_direct(fresh);
		node->below[0] = root->tree;
		snapshot(&root->tree, sizeof(root->tree));
		root->tree = fresh;
		cut(node, 0);
	}
	for (;;) {
		uint64_t i = place(node, key);
		if (i < node->rows && node->keys[i] == key) {
			snapshot(&node->values[i], sizeof(uint64_t));
			node->values[i] = value;
			return;
		}
		if (OID_IS_NULL(node->below[0])) {
			snapshot(&node->rows, sizeof(uint64_t));
			snapshot(node->keys + i, (node->rows - i + 1) * sizeof(uint64_t));
			snapshot(node->values + i, (node->rows - i + 1) * sizeof(uint64_t));
			shift(node, i);
			node->keys[i] = key;
			node->values[i] = value;
			node->rows++;
			snapshot(&root->count, sizeof(root->count));
			root->count++;
			return;
		}
		struct node *below = pmemobj_direct(node->below[i]);
		if (below->rows == ORDER - 1) {
			cut(node, i);
			continue;
		}
		node = below;
	}
}

static int tree_get(uint64_t key)
{
	struct node *node = pmemobj_direct(root->tree);
	for (;;) {
		uint64_t i = place(node, key);
		if (i < node->rows && node->keys[i] == key)
			return 1;
		if (OID_IS_NULL(node->below[0]))
			return 0;
		node = pmemobj_direct(node->below[i]);
	}
}

static void queue_step(uint64_t n)
{
	if (root->tail - root->head < RING && n % 2 == 0) {
		snapshot(&root->ring[root->tail % RING], sizeof(uint64_t));
		root->ring[root->tail % RING] = n;
		snapshot(&root->tail, sizeof(uint64_t));
		root->tail++;
	} else if (root->tail != root->head) {
		snapshot(&root->head, sizeof(uint64_t));
		root->head++;
	}
}

static void swap_step(uint64_t n)
{
	char *strings = pmemobj_direct(root->strings);
	char *one = strings + mix(n) % STRINGS * LENGTH;
	char *other = strings + mix(~n) % STRINGS * LENGTH;
	char kept[LENGTH];
	snapshot(one, LENGTH);
	snapshot(other, LENGTH);
	memcpy(kept, one, LENGTH);
	memcpy(one, other, LENGTH);
	memcpy(other, kept, LENGTH);
}

static void hash_step(uint64_t n) { hash_insert(mix(n), n); }
static void tree_step(uint64_t n) { tree_insert(mix(n), n); }
static int hash_look(uint64_t n) { return hash_get(mix(n)); }
static int tree_look(uint64_t n) { return tree_get(mix(n)); }

static double now(void)
{
	struct timespec at;
	clock_gettime(CLOCK_MONOTONIC, &at);
	return (double)at.tv_sec + (double)at.tv_nsec / 1e9;
}

static int ascending(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;
	return (x > y) - (x < y);
}

// The value below which 99 of 100 samples lie (nearest rank).
static double percentile(void)
{
	uint64_t count = 0;
	for (uint64_t n = 0; n < changes; n++)
		if (sampled[n] > 0)
			sampled[count++] = sampled[n];
	qsort(sampled, count, sizeof(double), ascending);
	return count ? sampled[(count * 99 + 99) / 100 - 1] : 0;
}

static void (*step)(uint64_t);
static int (*look)(uint64_t);

static void *change(void *which)
{
	for (uint64_t n = (uintptr_t)which; n < changes; n += (uint64_t)threads) {
		int timed = n / (uint64_t)threads % SAMPLE == 0;
		double from = timed ? now() : 0;
		pthread_rwlock_wrlock(&lock);
		begin();
		step(n);
		end();
		pthread_rwlock_unlock(&lock);
		if (timed)
			sampled[n] = now() - from;
	}
	return NULL;
}

static void *lookup(void *which)
{
	for (uint64_t n = (uintptr_t)which; n < changes; n += (uint64_t)threads) {
		pthread_rwlock_rdlock(&lock);
		int found = look(n);
		pthread_rwlock_unlock(&lock);
		if (!found) {
			fprintf(stderr, "pmdk: a key is missing\n");
			exit(1);
		}
	}
	return NULL;
}

static double timed(void *(*body)(void *))
{
	pthread_t all[16];
	double from = now();
	for (int i = 0; i < threads; i++)
		pthread_create(&all[i], NULL, body, (void *)(uintptr_t)i);
	for (int i = 0; i < threads; i++)
		pthread_join(all[i], NULL);
	return now() - from;
}

int main(int argc, char **argv)
{
	if (argc != 5 || atoi(argv[3]) < 1 || atoi(argv[3]) > 16) {
		fprintf(stderr, "usage: pmdk FILE WORKLOAD THREADS CHANGES\n");
		return 2;
	}
	threads = atoi(argv[3]);
	changes = strtoull(argv[4], NULL, 10);
	sampled = calloc(changes, sizeof(double));
	check(!sampled, "calloc");
	pool = pmemobj_create(argv[1], "workloads", 256 << 20, 0600);
	check(!pool, "create");
	root = pmemobj_direct(pmemobj_root(pool, sizeof(struct root)));
	begin();
	snapshot(root, sizeof(*root));
	if (!strcmp(argv[2], "hash")) {
		root->buckets = changes;
		root->table = pmemobj_tx_zalloc(changes * sizeof(PMEMoid), 3);
		check(OID_IS_NULL(root->table), "alloc");
		step = hash_step;
		look = hash_look;
	} else if (!strcmp(argv[2], "tree")) {
		root->tree = pmemobj_tx_zalloc(sizeof(struct node), 2);
		check(OID_IS_NULL(root->tree), "alloc");
		step = tree_step;
		look = tree_look;
	} else if (!strcmp(argv[2], "queue")) {
		step = queue_step;
	} else if (!strcmp(argv[2], "swap")) {
		root->strings = pmemobj_tx_zalloc(STRINGS * LENGTH, 4);
		check(OID_IS_NULL(root->strings), "alloc");
		char *strings = pmemobj_direct(root->strings);
		for (uint64_t n = 0; n < STRINGS; n++)
			for (uint64_t i = 0; i < LENGTH; i++)
				strings[n * LENGTH + i] = (char)(mix(n) >> (i % 8 * 8));
		step = swap_step;
	} else {
		fprintf(stderr, "pmdk: no such workload\n");
		return 2;
	}
	end();
	double changing = timed(change);
	double looking = look ? timed(lookup) : 0;
	if (look && root->count != changes) {
		fprintf(stderr, "pmdk: %llu of %llu keys are there\n", (unsigned long long)root->count,
			(unsigned long long)changes);
		return 1;
	}
	printf("%.9f %.9f %.9f\n", changing, looking, percentile());
	pmemobj_close(pool);
	return 0;
}
