/* One part of a program: registers itself, and computes something of a table. */
struct part {
	int number;
	unsigned long (*sum)(void);
	struct part *next;
};
extern struct part *parts;

static const char table[] = TABLE;

#define ROUND(n) \
	static unsigned long round_##n(unsigned long x) \
	{ \
		for (unsigned i = 0; i + 8 < sizeof table; i++) { \
			x = (x ^ (unsigned char)table[i]) * 0x100000001b3ul + n; \
			for (unsigned j = 0; j < 8; j++) \
				x += (x >> (7 + n % 5)) ^ (unsigned long)table[i + j] << j; \
		} \
		return x; \
	}
#define ROUNDS(n) ROUND(n##0) ROUND(n##1) ROUND(n##2) ROUND(n##3) ROUND(n##4) ROUND(n##5)
ROUNDS(1) ROUNDS(2) ROUNDS(3)
#define SUM(n) round_##n##0(round_##n##1(round_##n##2(round_##n##3(round_##n##4(round_##n##5(x))))))

static unsigned long sum(void)
{
	unsigned long x = PART;
	x = SUM(1);
	x = SUM(2);
	return SUM(3);
}

__attribute__((constructor)) static void enter(void)
{
	static struct part self = { PART, sum, 0 };
	self.next = parts;
	parts = &self;
}
