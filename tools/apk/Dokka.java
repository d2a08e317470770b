import java.nio.file.Files;
import java.nio.file.Path;
import org.jetbrains.dokka.DokkaBootstrapImpl;

/** Writes API docs as HTML by a configuration in JSON: {@code Dokka FILE}. Dokka's own command line is not in every registry. */
public class Dokka {
    public static void main(String[] arguments) throws Exception {
        int status = 1;
        try {
            var dokka = new DokkaBootstrapImpl();
            dokka.configure(Files.readString(Path.of(arguments[0])), (level, message) -> {
                if (level.equalsIgnoreCase("warn") || level.equalsIgnoreCase("error")) System.out.println(message);
            });
            dokka.generate();
            status = 0;
        } catch (Throwable error) {
            error.printStackTrace();
        }
        System.exit(status); // Dokka leaves threads behind
    }
}
