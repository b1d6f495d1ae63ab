import java.io.FileOutputStream;
import java.nio.ByteBuffer;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.security.MessageDigest;
import java.util.ArrayList;
import java.util.HexFormat;
import java.util.List;
import java.util.Map;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;

/**
 * Threads that make garbage and hot loops around a ledger.
 * Ledger ROUNDS PACE: ends after ROUNDS, or, where that is 0, once there is a file `finish`.
 */
public final class Ledger {
    static final int CELLS = 16384, WIDTH = 64, THREADS = 2;

    static final byte[] ledger = new byte[CELLS * WIDTH];
    static final Map<Integer, String> kept = new ConcurrentHashMap<>();

    record Link(Link next, byte[] content) { }

    static String digest(byte[]... parts) throws Exception {
        MessageDigest sum = MessageDigest.getInstance("SHA-256");
        for (byte[] part : parts) sum.update(part);
        return HexFormat.of().formatHex(sum.digest());
    }

    static long mix(long n) {
        n = (n ^ (n >>> 30)) * 0xbf58476d1ce4e5b9L;
        n = (n ^ (n >>> 27)) * 0x94d049bb133111ebL;
        return n ^ (n >>> 31);
    }

    /** What one thread does in a round: a list that becomes garbage, and a sum that is compiled. */
    static long work(int thread, int round) {
        Link list = null;
        for (int i = 0; i < 600; i++) list = new Link(list, new byte[200 + i % 50]);
        long sum = thread;
        int at = (int) ((round * 7L + thread) % CELLS) * WIDTH;
        for (Link link = list; link != null; link = link.next()) {
            sum = mix(sum + link.content().length + ledger[at + link.content().length % WIDTH]);
        }
        for (int i = 0; i < WIDTH * 50; i++) sum = mix(sum ^ ledger[at + i % WIDTH]);
        kept.put((round % 2000) * THREADS + thread, "round " + round + " " + sum);
        return sum;
    }

    public static void main(String[] words) throws Exception {
        int rounds = Integer.parseInt(words[0]), pace = Integer.parseInt(words[1]);
        for (int cell = 0; cell < CELLS; cell++) {
            String text = String.format("cell %06d %016x%016x%016x%016x", cell, mix(cell), mix(-cell),
                    mix(cell * 3L), mix(cell * 5L));
            System.arraycopy(text.getBytes(StandardCharsets.US_ASCII), 0, ledger, cell * WIDTH, WIDTH);
        }
        Path finish = Path.of("finish");
        FileOutputStream progress = new FileOutputStream("progress", true);
        ExecutorService pool = Executors.newFixedThreadPool(THREADS);
        int done = 0;
        byte[] last = new byte[8];
        while (rounds > 0 ? done < rounds : !Files.exists(finish)) {
            int round = done;
            List<Future<Long>> answers = new ArrayList<>();
            for (int me = 0; me < THREADS; me++) {
                int thread = me;
                answers.add(pool.submit(() -> work(thread, round)));
            }
            long sum = ByteBuffer.wrap(last).getLong();
            for (Future<Long> answer : answers) sum = mix(sum + answer.get());
            last = ByteBuffer.allocate(8).putLong(sum).array();
            done++;
            progress.write('x');
            if (pace > 0) Thread.sleep(pace);
        }
        pool.shutdown();
        List<String> all = new ArrayList<>();
        kept.forEach((key, text) -> all.add(key + " " + text));
        all.sort(null);
        String everything = digest(ledger, String.join("\n", all).getBytes(StandardCharsets.UTF_8));
        Files.writeString(Path.of("result"), done + "\n" + digest(last) + "\n" + everything + "\n");
    }
}
